"""Captions by a model of transformers in this process."""

import threading
from collections.abc import Iterator, Sequence

import torch

from data_prep.captioners.captioner import Answer, Question
from data_prep.images.images import decode_image
from data_prep.model_settings import CaptionsConfig
from model.captioners.vision_language import Prompt, Sampling, VisionLanguageModel
from model.scorers.files import ScorerFiles, find_scorer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_model(captions: CaptionsConfig) -> ScorerFiles:
    """Find the model's files, and download them first if they are on the hub.

    Raises:
        UserError: if there is no such folder, or the download fails.
    """
    pinned = f"{captions.model}@{captions.revision}" if captions.revision else captions.model
    return find_scorer(pinned, "captions.model")


class InProcessCaptioner:
    """A model, and the batches that it gets.

    A batch has questions of about one length, since the model runs the shorter ones as long as the longest.
    While one thread's batch is generated, another thread decodes the images of its own.
    """

    def __init__(self, captions: CaptionsConfig) -> None:
        """Load the model.

        Raises:
            UserError: if there is none, or its processor has no template.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sampling = Sampling(captions.temperature, captions.top_p)
        self.model = VisionLanguageModel(
            find_model(captions), device, DTYPES[captions.dtype], sampling, captions.template
        )
        self._batch = captions.batch
        self._generating = threading.Lock()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers, in the order of the questions."""
        answers: dict[int, Answer] = {}
        for batch in self._batches(questions):
            chosen = [questions[number] for number in batch]
            prompts = [
                Prompt(decode_image(question.image), question.prompt, question.seed) for question in chosen
            ]
            inputs = self.model.prepare(prompts)
            with self._generating:
                written = self.model.generate(
                    inputs, [prompt.seed for prompt in prompts], chosen[0].max_tokens
                )
            for number, (text, is_complete, prompt_tokens, tokens) in zip(batch, written, strict=True):
                answers[number] = Answer(text, "", is_complete, prompt_tokens, tokens)
        return [answers[number] for number in range(len(questions))]

    def close(self) -> None:
        """There is nothing to end."""

    def _batches(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Yield the numbers of the questions of each batch; all have one maximum of tokens."""
        asked = {question.prompt for question in questions}
        lengths = {prompt: self.model.length(prompt) for prompt in asked}

        def size(number: int) -> tuple[int, int]:
            question = questions[number]
            return question.max_tokens, lengths[question.prompt]

        # Sorting is stable, so equal prompts keep the order of the images.
        batch: list[int] = []
        for number in sorted(range(len(questions)), key=size):
            full = len(batch) == self._batch
            if batch and (full or questions[batch[0]].max_tokens != questions[number].max_tokens):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch
