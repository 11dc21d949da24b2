"""Prompts on their way to the network: each LLM reads them as it read the captions of its family."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.condition import Text
from pipeline.text.texts import TextConstants, pack, text_from_states, to_text

if TYPE_CHECKING:
    from model.encoders.text_encoder import TextEncoder


def load_llm(family: Family, device: torch.device) -> "TextEncoder":
    """Load the LLM that made a text family, and refuse any other.

    Raises:
        UserError: if the LLM is missing, or has other outputs.
    """
    # imports transformers, which takes seconds that a run without prompts need not wait for
    from model.encoders.text_encoder import check_identity, config_from_identity, load_encoder

    llm = load_encoder(config_from_identity(family.identity), device)
    # Another revision of the weights has other hidden states, for which the network was never trained.
    check_identity(llm, family.name, family.identity)
    return llm


class PromptReader:
    """Reads prompts with each LLM, and keeps their hidden states, so that no LLM reads a prompt twice."""

    def __init__(
        self,
        families: Mapping[str, Family],
        constants: Mapping[str, TextConstants],
        load: "Callable[[Family], TextEncoder]",
        clips: "PromptReader | None" = None,
    ) -> None:
        """Load nothing yet.

        Args:
            families: text families in fusion order.
            constants: of each family.
            load: returns a family's LLM; called when the first prompt comes.
            clips: reads prompts of clips; None = they are read like those of images.
        """
        self.families = families
        self.constants = constants
        self.llms: dict[str, TextEncoder] = {}
        self._load, self.clips = load, clips
        self.known: dict[str, dict[str, Tensor]] = {name: {} for name in families}
        """Family -> prompt -> its hidden states [T, W]."""

    def of(self, frames: int) -> "PromptReader":
        """Return the reader of prompts for images, or for clips of several frames."""
        return self if frames == 1 or self.clips is None else self.clips

    def read(self, prompts: Sequence[str], keep_llms: bool = True) -> None:
        """Run each LLM on the prompts that it has not read yet.

        Args:
            prompts: may repeat, and may be empty.
            keep_llms: False frees an LLM's memory before the next one is loaded.

        Raises:
            UserError: if a prompt has more tokens than the captions of a family can have.
        """
        for name, family in self.families.items():
            known = self.known[name]
            # The null caption needs no LLM: the family has stored its states.
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip() and prompt not in known]
            if not new:
                continue
            llm = self._llm(name, family)
            for prompt in new:  # one by one, so that the hidden states do not depend on the other prompts
                known[prompt] = llm.encode([_tokenize(llm, name, prompt)])[0]
            if not keep_llms:
                del self.llms[name]

    def _llm(self, name: str, family: Family) -> "TextEncoder":
        if name not in self.llms:
            self.llms[name] = self._load(family)
        return self.llms[name]

    def spans(self, prompt: str, without: Sequence[str] = ()) -> list[list[tuple[int, int]]]:
        """Return the tokens' places in a prompt.

        Args:
            prompt: the text.
            without: families that get the null caption.

        Returns:
            For each LLM, begin and end of each token that `texts` returns after the prefix; (0, 0) = not in
            the prompt.
        """
        spans = []
        for name, family in self.families.items():
            if name in without:
                spans.append([(0, 0)] * len(self.constants[name].null))
            else:
                spans.append(self._llm(name, family).spans(prompt))
        return spans

    def texts(
        self, prompts: Sequence[str], dtype: torch.dtype, quantized: bool = False, without: Sequence[str] = ()
    ) -> list[Text]:
        """Return the prompts as the network reads them, one `Text` per LLM.

        Args:
            prompts: one per image; an empty prompt is the null caption.
            dtype: of the hidden states.
            quantized: quantize and dequantize the hidden states first, as those that training saw.
            without: families that get the null caption.
        """
        # A prompt that was read before costs nothing here, even if its LLM was freed.
        self.read(prompts)
        texts = []
        for name, known in self.known.items():
            constants = self.constants[name]
            states = [known[prompt] if prompt.strip() and name not in without else None for prompt in prompts]
            if quantized:
                texts.append(to_text(pack(states, constants), constants, dtype))
            else:
                texts.append(text_from_states(states, constants, dtype))
        return texts


def _tokenize(llm: "TextEncoder", name: str, prompt: str) -> list[int]:
    before = llm.truncated
    ids = llm.tokenize([prompt])[0]
    # Training cuts long captions. A prompt is refused instead, because its end would be missing in the image.
    if llm.truncated > before:
        limit = f"longer than the {llm.config.max_tokens} tokens of {name}"
        raise UserError(f"prompt {prompt[:40]!r}...: {limit}: shorten it")
    return ids
