"""What a caption's states take in the store, and what quantising them costs: `python -m benchmarks.text_storage`.

Bytes are counted for encoders 4096 wide, from the token counts of real tokenizers; errors are measured on the states of
real LLMs, a channel at a time, in units of that channel's spread, on captions that the calibration did not see.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.captions import dense_captions, short_captions
from benchmarks.text_encoding import ENCODERS, hardware, versions
from data_prep.text import is_held_out, measure_channels
from model.quantise import BYTES_PER_TOKEN, dequantise, quantise
from model.text_encoder import load_encoder

TABLE = Path(__file__).parent / "results" / "text_storage.md"
WIDTH = 4096
QUANTISATIONS = ["bf16", "int8", "int6", "int4"]


def caption_bytes(quantisation: str, tokens: float) -> float:
    """Bytes of a caption's values and scales at `WIDTH` channels."""
    return tokens * (BYTES_PER_TOKEN(quantisation, WIDTH) + (0 if quantisation == "bf16" else 4))


def channel_errors(states: Tensor, mean: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """Root mean square error of each channel [W], in units of its spread."""
    exact = (states - mean) / spread  # [N, W]
    errors = {}
    for quantisation in QUANTISATIONS:
        values, scales, _ = quantise(states, quantisation, mean, spread)
        stored = dequantise(values, scales, quantisation, mean, spread, torch.float32)
        errors[quantisation] = (stored - exact).square().mean(0).sqrt()
    scale = states.abs().amax(1, keepdim=True) / 127
    obvious = ((states / scale).round() * scale - mean) / spread
    errors["int8, scale per token alone"] = (obvious - exact).square().mean(0).sqrt()
    return errors


def main() -> None:
    """Measure, add the results to the table, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", type=int, default=500)
    parser.add_argument("--dense", type=int, default=24)
    parser.add_argument("--no-table", action="store_true", help="leave the table of results as it is")
    arguments = parser.parse_args()
    kinds = {"short": short_captions(arguments.short), "dense": dense_captions(arguments.dense)}
    rows, goals = [], {}
    stamp = f"{date.today()} | {hardware()} | {versions()}"
    for config in ENCODERS:
        encoder = load_encoder(config, torch.device("cpu"))
        prefix = len(encoder.prefix_ids)
        ids = {kind: encoder.tokenise(captions) for kind, captions in kinds.items()}
        for kind, captions in ids.items():
            tokens = sum(map(len, captions)) / len(captions)
            ways = {
                "fp32, padded to 512": 512 * WIDTH * 4,
                "fp16, padded to 300": 300 * WIDTH * 2,
                "bf16, whole prompts, unpadded": caption_bytes("bf16", prefix + tokens),
                **{f"ours, {quantisation}": caption_bytes(quantisation, tokens) for quantisation in QUANTISATIONS},
            }
            base = ways["bf16, whole prompts, unpadded"]
            for way, size in ways.items():
                shares = f"{size / base:.3f} | {size / ways['ours, bf16']:.4f}"
                rows.append(f"| {stamp} | {config.name}, {kind} ({tokens:.1f} tokens) | {way} | {size:,.0f} B | {shares} |")
            share = round(ways["ours, int8"] / base, 3)
            goals[f"{config.name} {kind} int8 bytes / bf16 unpadded"] = {"value": share, "goal": 0.5, "met": share <= 0.5}
        texts = kinds["short"] + kinds["dense"]
        states = encoder.encode(ids["short"] + ids["dense"])
        mean, spread = measure_channels([state for state, text in zip(states, texts, strict=True) if not is_held_out(text)])
        held_out = torch.cat([state for state, text in zip(states, texts, strict=True) if is_held_out(text)]).float()
        for way, error in channel_errors(held_out, mean, spread).items():
            rows.append(
                f"| {stamp} | {config.name}, {len(held_out)} held-out tokens | {way} | error a channel "
                f"| mean {error.mean():.2%} | worst {error.max():.2%} |"
            )
            if way == "int8":
                value = round(error.max().item(), 4)
                goals[f"{config.name} int8 worst channel"] = {"value": value, "goal": 0.01, "met": value <= 0.01}
    print("\n".join(rows))
    if not arguments.no_table:
        with TABLE.open("a") as table:
            table.write("".join(row + "\n" for row in rows))
    print(json.dumps({"benchmark": "text_storage", "goals": goals}))


if __name__ == "__main__":
    main()
