"""BLIP as it answers questions about pictures, with the numbers that T2I-CompBench's BLIP-VQA takes from it."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

from model.scorers.files import ScorerFiles, load_model, load_pretrained

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
        self.model: Any = load_model(BlipForQuestionAnswering, files, device)
        self.side = side or self.model.config.vision_config.image_size
        self.start = self.model.config.text_config.bos_token_id
        self.identity = {**files.identity, "picture": f"{self.side}x{self.side}", "answer": "yes", "dtype": "float32"}

    @torch.no_grad()
    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of the answer's first token, per question."""
        words = [self._word("yes"), self._word("no")]
        start = torch.tensor([[self.start]], device=self.model.device)
        logits = [self._decode(start, states)[0, 0, words] for states in self._read(image, questions)]
        return [float(each.double().softmax(0)[0]) for each in logits]

    @torch.no_grad()
    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """The answers in words, by beam search."""
        answers: list[str] = []
        for states in self._read(image, questions):
            seen = states.expand(BEAMS, -1, -1)
            tokens = self.model.text_decoder.generate(
                input_ids=torch.tensor([[self.start]], device=self.model.device),
                encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device),
                num_beams=BEAMS, max_length=ANSWER_TOKENS, min_length=1, do_sample=False,
                eos_token_id=self.tokenizer.sep_token_id, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            answers.append(self.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True).strip().lower())
        return answers

    @torch.no_grad()
    def likelihood(self, image: Image.Image, question: str, answer: str) -> float:
        """Geometric mean of the probabilities of the answer's tokens and of its end."""
        (states,) = self._read(image, [question])
        wanted = [*self.tokenizer(answer.lower(), add_special_tokens=False).input_ids, self.tokenizer.sep_token_id]
        logits = self._decode(torch.tensor([[self.start, *wanted[:-1]]], device=self.model.device), states)[0]
        return mean_probability(logits, wanted)

    def _read(self, image: Image.Image, questions: Sequence[str]) -> list[Tensor]:
        """Each question's states [1, T, C] that have seen the picture; one by one, so that none is padded."""
        if not questions:
            return []
        pixels = self.processor(images=image, size={"height": self.side, "width": self.side}, return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device), interpolate_pos_encoding=True)[0]
        read: list[Tensor] = []
        for question in questions:
            tokens = self.tokenizer(question, truncation=True, max_length=QUESTION_TOKENS, return_tensors="pt").to(seen.device)
            tokens.input_ids[:, 0] = self.start + 1  # [ENC], the token after [DEC]: BLIP was trained to start a question with it
            output = self.model.text_encoder(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen, return_dict=True
            )
            read.append(output[0])
        return read

    def _decode(self, tokens: Tensor, states: Tensor) -> Tensor:
        return self.model.text_decoder(input_ids=tokens, encoder_hidden_states=states, return_dict=True).logits

    def _word(self, word: str) -> int:
        return self.tokenizer(word, add_special_tokens=False).input_ids[0]


def mean_probability(logits: Tensor, tokens: Sequence[int]) -> float:
    """exp of the mean log-probability of `tokens` under logits [len(tokens), V]."""
    wanted = torch.tensor(tokens, device=logits.device)
    return float(torch.exp(-torch.nn.functional.cross_entropy(logits.double(), wanted)))
