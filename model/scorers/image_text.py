"""Image-text-to-text models of transformers: VQAScore, and answers in words."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from model.common.errors import UserError
from model.scorers.blip_vqa import BlipVQA, mean_probability
from model.scorers.files import ScorerFiles, load_model, load_pretrained

ANSWER_TOKENS = 5


def load_vqa(files: ScorerFiles, device: torch.device, side: int | None) -> "BlipVQA | ImageTextModel":
    """Load the VQA model of a folder: BLIP in fp32, others in bf16 on a GPU.

    Args:
        files: the scorer's folder.
        device: where it runs.
        side: size of the images for BLIP.

    Raises:
        UserError: if the folder contains another kind of model.
    """
    if load_pretrained(AutoConfig, files).model_type == "blip":
        return BlipVQA(files, device, side)
    return ImageTextModel(files, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


class ImageTextModel:
    """Answers questions about an image: InstructBLIP-FlanT5, LLaVA, Qwen-VL and others."""

    def __init__(self, files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> None:
        """Load the model.

        Args:
            files: the scorer's folder.
            device: where it runs.
            dtype: type of its weights.

        Raises:
            UserError: if the folder contains another kind of model, or a decoder without a chat template.
        """
        self.processor: Any = load_pretrained(AutoProcessor, files)
        self.model: Any = load_model(AutoModelForImageTextToText, files, device, dtype)
        self.tokenizer: Any = self.processor.tokenizer
        self.encodes = bool(self.model.config.get_text_config().is_encoder_decoder)
        self.chats = getattr(self.processor, "chat_template", None) is not None
        # An encoder-decoder of FlanT5's kind reads the plain question.
        if not (self.encodes or self.chats):
            raise UserError(
                f"{files.folder}: its processor has no chat template: take an instruction-tuned model"
            )
        self.identity = {
            **files.identity,
            "dtype": str(dtype).removeprefix("torch."),
            "chat_template": self.chats,
        }

    def likelihood(self, image: Image.Image, question: str, answer: str) -> float:
        """Return the VQAScore (Lin et al., 2024): the geometric mean of the token probabilities of an answer.

        For an encoder-decoder, its end token is included.
        """
        wanted = self._tokens(answer)
        if self.encodes:
            wanted = [*wanted, self.tokenizer.eos_token_id]
        return mean_probability(self.logits(image, question, wanted), wanted)

    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """Return P(Yes) / (P(Yes) + P(No)) of the answer's first token for each question."""
        # Capitalized, as instruction-tuned models begin an answer; BLIP's vocabulary has no capitals.
        words = [self._tokens(word)[0] for word in ("Yes", "No")]
        probabilities: list[float] = []
        for question in questions:
            # The first logits do not depend on the answer that is given, so any one token will do.
            logits = self.logits(image, question, words[:1])[0, words]
            probabilities.append(float(logits.double().softmax(0)[0]))
        return probabilities

    @torch.no_grad()
    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Return the answers in words, decoded greedily: lower case, without a period."""
        answers: list[str] = []
        for question in questions:
            inputs = self._inputs(image, question)
            tokens = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            # A decoder repeats the prompt.
            new = tokens if self.encodes else tokens[:, inputs["input_ids"].shape[1] :]
            answers.append(
                self.tokenizer.decode(new[0], skip_special_tokens=True).strip().rstrip(".").lower()
            )

        return answers

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _inputs(self, image: Image.Image, question: str) -> dict[str, Tensor]:
        text = question
        if self.chats:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor(images=image, text=text, return_tensors="pt").to(
            self.model.device, self.model.dtype
        )

    @torch.no_grad()
    def logits(self, image: Image.Image, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits of an answer's tokens, each predicted from the tokens before it.

        Args:
            image: the image.
            question: the question.
            answer: token ids.

        Returns:
            [len(answer), V].
        """
        inputs = self._inputs(image, question)
        wanted = torch.tensor([list(answer)], device=self.model.device)
        if self.encodes:
            return self.model(**inputs, labels=wanted).logits[0]

        # A decoder reads prompt and answer as one sequence; the logits of a token are at the position before
        # it.
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], wanted], 1)
        # One prompt is never padded.
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.zeros_like(wanted)], 1)

        return self.model(**inputs).logits[0, length - 1 : length - 1 + len(answer)]
