"""Vision-language models of transformers: from images and prompts to texts, many at once."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from model.common.errors import UserError
from model.scorers.files import ScorerFiles, load_model, load_pretrained


@dataclass(frozen=True)
class Sampling:
    """The rule by which the next token is picked."""

    temperature: float = 0.0
    """0 = always the likeliest token."""
    top_p: float = 1.0
    """The likeliest tokens with this probability together can be picked."""


class Prompt(NamedTuple):
    """An image and what is asked about it."""

    image: Image.Image
    text: str
    seed: int
    """Seed of the answer's random numbers, from 0 to 2^63 - 1."""


class Written(NamedTuple):
    """An answer."""

    text: str
    is_complete: bool
    """False if the answer was cut at the maximum number of tokens."""
    prompt_tokens: int
    tokens: int


class VisionLanguageModel:
    """A model such as LLaVA, Qwen-VL or SmolVLM, with its processor."""

    def __init__(
        self, files: ScorerFiles, device: torch.device, dtype: torch.dtype, sampling: Sampling, template: str
    ) -> None:
        """Load the model.

        Args:
            files: the model's folder.
            device: where it runs.
            dtype: type of its weights.
            sampling: how tokens are picked.
            template: the whole input with `{prompt}`, for processors without a chat template; "" = the chat
                template.

        Raises:
            UserError: if the folder contains another kind of model, or there is no template.
        """
        self.processor: Any = load_pretrained(AutoProcessor, files)
        self.model: Any = load_model(AutoModelForImageTextToText, files, device, dtype)
        self.tokenizer: Any = self.processor.tokenizer
        # A fast tokenizer fails with `Already borrowed` if two threads use it at once and one of them pads.
        self._tokenizing = threading.Lock()
        self._sampling = sampling
        self._template = template
        if not template and getattr(self.processor, "chat_template", None) is None:
            raise UserError(
                f"{files.folder}: its processor has no chat template: set captions.template, with {{prompt}} "
                "and the model's image token"
            )

        # Answers begin where the prompts end, so short prompts are padded at their start.
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._encodes = bool(self.model.config.get_text_config().is_encoder_decoder)
        self._ends = _token_list(self.model.generation_config.eos_token_id) or _token_list(
            self.tokenizer.eos_token_id
        )
        image_token = getattr(self.processor, "image_token", None)
        special = {*self.tokenizer.all_special_tokens, *([image_token] if image_token else [])}
        self._special = sorted(map(str, special), key=len, reverse=True)

    def whole_prompt(self, text: str) -> str:
        """Return the model's input for a prompt, with its markup and a place for the image."""
        # A prompt may quote a caption of the web: a token of the markup in it would be read as one.
        for token in self._special:
            text = text.replace(token, " ")
        if self._template:
            return self._template.replace("{prompt}", text)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def length(self, text: str) -> int:
        """Return the number of tokens of a prompt, without those of the image."""
        with self._tokenizing:
            return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prepare(self, prompts: Sequence[Prompt]) -> Any:
        """Return the model's inputs; this runs on the CPU, and other threads may generate meanwhile."""
        with self._tokenizing:
            return self.processor(
                text=[self.whole_prompt(prompt.text) for prompt in prompts],
                images=[[prompt.image] for prompt in prompts],
                padding=True,
                return_tensors="pt",
            )

    @torch.inference_mode()
    def generate(self, inputs: Any, seeds: Sequence[int], max_tokens: int) -> list[Written]:
        """Return an answer for each prompt.

        Args:
            inputs: as returned by `prepare`.
            seeds: seed of each answer. An answer does not depend on the others of the batch.
            max_tokens: tokens at which an answer is cut.
        """
        inputs = inputs.to(self.model.device, self.model.dtype)
        processors = LogitsProcessorList()
        if self._sampling.temperature > 0:
            processors.append(SeededSampling(self._sampling, seeds, self.model.device))
        output = self.model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1, logits_processor=processors
        )
        # A decoder repeats the prompt.
        tokens = output if self._encodes else output[:, inputs["input_ids"].shape[1] :]
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [self._written(row, length) for row, length in zip(tokens.tolist(), lengths, strict=True)]

    def _written(self, tokens: list[int], prompt_tokens: int) -> Written:
        ends = [place for place, token in enumerate(tokens) if token in self._ends]
        # Behind the end token there is padding, up to the longest answer of the batch.
        own = tokens[: ends[0] + 1] if ends else tokens
        with self._tokenizing:
            text = self.tokenizer.decode(own, skip_special_tokens=True)
        return Written(text, bool(ends), prompt_tokens, len(own))


class SeededSampling(LogitsProcessor):
    """Makes the likeliest token a sampled one, with random numbers of each answer's own.

    The token with the largest sum of logit and Gumbel noise has the probabilities of the softmax (Gumbel,
    1954). transformers samples from one generator for the whole batch, so its answers depend on the batch.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature = sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return logits plus noise, [B, V]."""
        scores = scores.float() / self._temperature
        if self._top_p is not None:
            scores = self._top_p(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def _token_list(tokens: int | list[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)
