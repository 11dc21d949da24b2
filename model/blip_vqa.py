"""BLIP as it answers questions about pictures, with the numbers that T2I-CompBench's BLIP-VQA takes from it."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

from model.scorers import ScorerFiles, load_pretrained

QUESTION_TOKENS = 35
"""BLIP's own limit; what is longer is cut."""
BEAMS, ANSWER_TOKENS = 3, 10
"""BLIP's own settings of generated answers."""


class BlipVQA:
    """Answers questions; one picture at a time, any number of questions."""

    def __init__(self, files: ScorerFiles, device: torch.device, side: int | None = None) -> None:
        """Load it in fp32.

        Args:
            files: where it is.
            device: where it runs.
            side: the picture is resized to side x side, position embeddings are interpolated; None = as it was trained.

        Raises:
            UserError: the folder holds another model.
        """
        self.tokenizer: Any = load_pretrained(AutoTokenizer, files)
        self.processor: Any = load_pretrained(AutoImageProcessor, files)
        self.model: Any = load_pretrained(BlipForQuestionAnswering, files, use_safetensors=True).to(device).eval()
        self.side = side or self.model.config.vision_config.image_size
        self.start = self.model.config.text_config.bos_token_id
        self.identity = {**files.identity, "picture": f"{self.side}x{self.side}", "answer": "yes", "dtype": "float32"}

    @torch.no_grad()
    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of the answer's first token, per question."""
        if not questions:
            return []
        states, mask = self._read(image, questions)
        start = torch.full((len(questions), 1), self.start, device=self.model.device)
        logits = self._decode(start, states, mask)[:, 0]
        words = logits[:, [self._word("yes"), self._word("no")]]
        return words.double().softmax(1)[:, 0].tolist()

    @torch.no_grad()
    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """The answers in words, by beam search."""
        if not questions:
            return []
        states, _ = self._read(image, questions)
        states = states.repeat_interleave(BEAMS, 0)
        tokens = self.model.text_decoder.generate(
            input_ids=torch.full((len(questions), 1), self.start, device=self.model.device),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
            num_beams=BEAMS, max_length=ANSWER_TOKENS, min_length=1, do_sample=False,
            eos_token_id=self.tokenizer.sep_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return [text.strip().lower() for text in self.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)]

    @torch.no_grad()
    def likelihood(self, image: Image.Image, question: str, answer: str) -> float:
        """Geometric mean of the probabilities of the answer's tokens and of its end."""
        states, mask = self._read(image, [question])
        wanted = [*self.tokenizer(answer.lower(), add_special_tokens=False).input_ids, self.tokenizer.sep_token_id]
        logits = self._decode(torch.tensor([[self.start, *wanted[:-1]]], device=self.model.device), states, mask)[0]
        return mean_probability(logits, wanted)

    def _read(self, image: Image.Image, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The questions' states that have seen the picture [B, T, C], and which of them are real [B, T]."""
        pixels = self.processor(images=image, size={"height": self.side, "width": self.side}, return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device), interpolate_pos_encoding=True)[0]
        seen = seen.expand(len(questions), -1, -1)
        tokens = self.tokenizer(
            list(questions), padding=True, truncation=True, max_length=QUESTION_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        tokens.input_ids[:, 0] = self.start + 1  # [ENC], the token after [DEC]: what BLIP was trained to start a question with
        states = self.model.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            return_dict=True,
        )[0]
        return states, tokens.attention_mask

    def _decode(self, tokens: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return self.model.text_decoder(
            input_ids=tokens, encoder_hidden_states=states, encoder_attention_mask=mask, return_dict=True
        ).logits

    def _word(self, word: str) -> int:
        return self.tokenizer(word, add_special_tokens=False).input_ids[0]


def mean_probability(logits: Tensor, tokens: Sequence[int]) -> float:
    """exp of the mean log-probability of `tokens` under logits [len(tokens), V]."""
    wanted = torch.tensor(tokens, device=logits.device)
    return float(torch.exp(-torch.nn.functional.cross_entropy(logits.double(), wanted)))
