"""Speed of captions by a model in this process, compared with a plain loop of `generate`, in one run.

    python -m benchmarks.captioning [--images 64] [--tokens 32] [--batch 16] [--rounds 3] [--tiny]

Both ways ask the same model the same prompts about the same stored images. The plain loop is that of most
scripts: open the image, fill the chat template, `generate`, decode, one question after the other, and one
JSON file at the end. Ours is the whole step, from the pairs in the store to the committed family. They run in
turns, so that a noisy machine slows both alike, and the number of equal answers is printed.

No package ships a vision-language model, so the model is a LLaVA with random weights: CLIP ViT-B/32's shape
for the images, and SmolLM2-135M's for the text. Without an end token, all answers are as long as `--tokens`.
`--tiny` runs the same code on a model of a few thousand weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.pairs import make_jpegs, write_source
from benchmarks.reporting import at_least, conditions, print_goals
from data_prep.captioners.answers import CUT, REPEATS
from data_prep.captioners.in_process import find_model
from data_prep.config import BucketConfig, DatasetConfig, DedupeConfig, SourceConfig
from data_prep.dataset.parts import committed, read_plan, register_family
from data_prep.dataset.schema import PAIRS
from data_prep.families.captions import CaptionsStep, captions_family
from data_prep.families.generated import read_captions_family, read_rows
from data_prep.images.images import decode_image
from data_prep.model_settings import CaptionsConfig, PromptConfig
from data_prep.pairs.pairs import Pair, read_pairs, run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import Store, open_store
from model.captioners.vision_language import Sampling, VisionLanguageModel
from model.common.dtypes import DTYPES
from model.common.share import Share

GOAL = 2.0
WORDS = 1000
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        "text_config": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
    },
    "tiny": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    },
}
"""Sizes of the image and the text model."""
PROMPTS = {"short": "w1 w2 w3 w4 w5 w6", "dense": " ".join(f"w{number}" for number in range(7, 27))}
"""Two prompts, of 6 and 20 tokens."""


def make_model(folder: Path, shape: str) -> None:
    """Save a LLaVA with random weights and a tokenizer of a word per token."""
    words = ["<pad>", "<unk>", "<image>", *(f"w{number}" for number in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    sizes = SHAPES[shape]
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes["vision_config"]},
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **sizes["text_config"],
        },
        image_token_index=2,
        vision_feature_layer=-1,
    )
    side = sizes["vision_config"]["image_size"]
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False),
        tokenizer,
        patch_size=sizes["vision_config"]["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def plain_loop(
    model: VisionLanguageModel, pairs: list[Pair], tokens: int, path: Path
) -> dict[int, list[str]]:
    """Ask one question after the other, as a simple script would, and write the answers to a file."""
    answers: dict[int, list[str]] = {}
    for pair in pairs:
        answers[pair.id] = []
        for prompt in PROMPTS.values():
            inputs = model.processor(
                text=model.whole_prompt(prompt), images=decode_image(pair.image), return_tensors="pt"
            ).to(model.model.device, model.model.dtype)
            with torch.inference_mode():
                output = model.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            answers[pair.id].append(model.tokenizer.decode(new, skip_special_tokens=True))
    path.write_text(json.dumps(answers))
    return answers


def our_answers(dataset: Store, name: str) -> dict[int, list[str]]:
    """Return the captions of a family, and the starts of its dropped answers, by sample."""
    family = read_captions_family(dataset, name)
    answers: dict[int, list[str]] = {}
    for commit in committed(dataset, name).values():
        for row in read_rows(dataset, family, commit):
            # Without an end token all answers are cut or repeat themselves, so they are dropped ones.
            dropped = json.loads(row["dropped"])
            if any(entry["reason"] not in (CUT, REPEATS) for entry in dropped):
                raise RuntimeError(f"an answer is dropped for another reason: {dropped}")
            answers[row["id"]] = [entry["text"] for entry in dropped]
    return answers


def seconds(step: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Measure both ways in turns, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="length of each answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, few images")
    options = parser.parse_args(argv)
    shape = "tiny" if options.tiny else "small"
    images, rounds = (6, 1) if options.tiny else (options.images, options.rounds)
    dtype = "bf16" if torch.cuda.is_available() else "fp32"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", shape)
        jpegs = make_jpegs(images)
        write_source(folder / "in", jpegs, [f"image {number}" for number in range(images)])
        captions = CaptionsConfig(
            name="captions",
            model=str(folder / "model"),
            prompts=[PromptConfig(kind, text, options.tokens) for kind, text in PROMPTS.items()],
            dtype=dtype,
            batch=options.batch,
        )
        config = DatasetConfig(
            name="benchmark",
            store=str(folder / "store"),
            sources=[SourceConfig(path=str(folder / "in"))],
            buckets=BucketConfig(resolution=256),
            dedupe=DedupeConfig(exact=False),
            part_rows=max(1, images // 2),
            workers=0,
        )
        dataset = open_store(config.store, create=True).sub(config.name)
        run_plan(config, dataset, Share())
        run_pairs(config, dataset, Share())
        pairs: list[Pair] = []
        for commit in committed(dataset, PAIRS).values():
            pairs += read_pairs(dataset, commit, read_plan(dataset).caption_kinds)

        model = VisionLanguageModel(
            find_model(captions),
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            DTYPES[dtype],
            Sampling(),
            "",
        )
        plain: dict[int, list[str]] = {}
        spent: list[tuple[float, float]] = []
        step = CaptionsStep(captions, dataset, register_family(dataset, captions_family(captions), None))
        # Both ways have loaded their model before the first round.
        with step.setup() as do:
            for _ in range(rounds):
                slow = seconds(
                    lambda: plain.update(plain_loop(model, pairs, options.tokens, folder / "answers.json"))
                )
                for commit in committed(dataset, captions.name).values():
                    dataset.delete(commit.part.commit_key(captions.name))
                spent.append((slow, seconds(lambda: list(do(step.units)))))

        ours = our_answers(dataset, captions.name)
        same = sum(
            answer[:200] == other
            for id, answers in plain.items()
            for answer, other in zip(answers, ours[id], strict=True)
        )

    asked = images * len(PROMPTS)
    rates = {
        "plain loop of generate": asked / statistics.median(slow for slow, _ in spent),
        "ours: captions, from pairs to commit": asked / statistics.median(fast for _, fast in spent),
    }
    ratio = statistics.median(slow / fast for slow, fast in spent)
    print(
        f"{images} images, 2 prompts each, {options.tokens} tokens per answer, {dtype}, batch {options.batch}"
    )
    print("| | captions/s |\n|---|---|")
    for way, rate in rates.items():
        print(f"| {way} | {rate:.2f} |")
    goals = {"captions/s of captions / plain loop": at_least(ratio, GOAL)}
    print(f"captions / plain loop: {goals['captions/s of captions / plain loop']}; {conditions()}")
    print(f"equal answers: {same} of {asked}")
    print_goals("captioning", goals, rates=rates, equal_answers=same, answers=asked)


if __name__ == "__main__":
    main()
