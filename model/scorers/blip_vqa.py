"""BLIP, which answers questions about images, with the probabilities that T2I-CompBench's BLIP-VQA needs."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

from model.scorers.files import ScorerFiles, load_model, load_pretrained

QUESTION_TOKENS = 35
"""BLIP's own limit; longer questions are truncated."""
BEAMS, ANSWER_TOKENS = 3, 10
"""BLIP's own settings for generating answers."""


class BlipVQA:
    """Answers any number of questions about one image at a time."""

    def __init__(self, files: ScorerFiles, device: torch.device, side: int | None = None) -> None:
        """Load the model in fp32.

        Args:
            files: the scorer's folder.
            device: where it runs.
            side: resize images to side x side and interpolate the position embeddings; None = the size of its
                training.

        Raises:
            UserError: if the folder contains another model.
        """
        self.tokenizer: Any = load_pretrained(AutoTokenizer, files)
        self.processor: Any = load_pretrained(AutoImageProcessor, files)
        self.model: Any = load_model(BlipForQuestionAnswering, files, device)
        self.side = side or self.model.config.vision_config.image_size
        self.start = self.model.config.text_config.bos_token_id
        # Results on disk have the key `picture`.
        self.identity = {
            **files.identity,
            "picture": f"{self.side}x{self.side}",
            "answer": "yes",
            "dtype": "float32",
        }

    @torch.no_grad()
    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """Return P(yes) / (P(yes) + P(no)) of the answer's first token for each question."""
        words = [self._word("yes"), self._word("no")]
        start = torch.tensor([[self.start]], device=self.model.device)
        probabilities: list[float] = []
        for states in self._read(image, questions):
            logits = self._decode(start, states)[0, 0, words]
            probabilities.append(float(logits.double().softmax(0)[0]))
        return probabilities

    @torch.no_grad()
    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Return the answers in words, by beam search."""
        answers: list[str] = []
        for states in self._read(image, questions):
            beams = states.expand(BEAMS, -1, -1)
            tokens = self.model.text_decoder.generate(
                input_ids=torch.tensor([[self.start]], device=self.model.device),
                encoder_hidden_states=beams,
                encoder_attention_mask=torch.ones(beams.shape[:2], device=beams.device),
                num_beams=BEAMS,
                max_length=ANSWER_TOKENS,
                min_length=1,
                do_sample=False,
                eos_token_id=self.tokenizer.sep_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            # The first token is the start token.
            answers.append(self.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True).strip().lower())

        return answers

    @torch.no_grad()
    def likelihood(self, image: Image.Image, question: str, answer: str) -> float:
        """Return the geometric mean of the probabilities of the answer's tokens and its end token."""
        # Each token is predicted from the ones before it, so the last one is not an input.
        (states,) = self._read(image, [question])
        wanted = [
            *self.tokenizer(answer.lower(), add_special_tokens=False).input_ids,
            self.tokenizer.sep_token_id,
        ]
        logits = self._decode(torch.tensor([[self.start, *wanted[:-1]]], device=self.model.device), states)[0]
        return mean_probability(logits, wanted)

    def _read(self, image: Image.Image, questions: Sequence[str]) -> list[Tensor]:
        """Return each question's hidden states [1, T, C] after attention to the image."""
        if not questions:
            return []

        size = {"height": self.side, "width": self.side}
        pixels = self.processor(images=image, size=size, return_tensors="pt").pixel_values.to(
            self.model.device
        )
        patches = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)[0]

        states: list[Tensor] = []
        # One by one: BLIP's answers change if questions are padded.
        for question in questions:
            tokens = self.tokenizer(
                question, truncation=True, max_length=QUESTION_TOKENS, return_tensors="pt"
            )
            # BLIP was trained with questions that start with [ENC], the token after [DEC]; transformers
            # writes [CLS].
            tokens.input_ids[:, 0] = self.start + 1
            tokens = tokens.to(patches.device)
            output = self.model.text_encoder(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=patches,
                return_dict=True,
            )
            states.append(output[0])

        return states

    def _decode(self, tokens: Tensor, states: Tensor) -> Tensor:
        return self.model.text_decoder(
            input_ids=tokens, encoder_hidden_states=states, return_dict=True
        ).logits

    def _word(self, word: str) -> int:
        return self.tokenizer(word, add_special_tokens=False).input_ids[0]


def mean_probability(logits: Tensor, tokens: Sequence[int]) -> float:
    """Return the geometric mean of the probabilities of `tokens` under logits [len(tokens), V]."""
    wanted = torch.tensor(tokens, device=logits.device)
    return float(torch.exp(-torch.nn.functional.cross_entropy(logits.double(), wanted)))
