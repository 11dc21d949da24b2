"""Prompts on their way to the network: each LLM reads them as the families of its training were made."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.condition import Text
from model.encoders.text_encoder import TextEncoder, check_identity, config_from_identity, load_encoder
from pipeline.text.texts import TextConstants, pack, text_from_states, to_text


def load_llm(family: Family, device: torch.device) -> TextEncoder:
    """The LLM that made a text family, and nothing but that one.

    Raises:
        UserError: it is missing, or gives other numbers.
    """
    llm = load_encoder(config_from_identity(family.identity), device)
    check_identity(llm, family.name, family.identity)
    return llm


class PromptReader:
    """Keeps the states of the prompts that it has read, so each distinct prompt goes through each LLM once."""

    def __init__(
        self, families: Mapping[str, Family], constants: Mapping[str, TextConstants], load: Callable[[Family], TextEncoder]
    ) -> None:
        """Load nothing yet.

        Args:
            families: text families in fusion order.
            constants: what all captions of each family share.
            load: gives a family's LLM; called when the first prompt comes.
        """
        self.families = families
        self.constants = constants
        self.llms: dict[str, TextEncoder] = {}
        self._load = load
        self.known: dict[str, dict[str, Tensor]] = {name: {} for name in families}
        """Family -> prompt -> its states [T, W]."""

    def read(self, prompts: Sequence[str], keep_llms: bool = True) -> None:
        """Run each LLM on the prompts that are new to it; `keep_llms=False` frees each one's memory before the next.

        Raises:
            UserError: a prompt is longer than the families were made for.
        """
        for name, family in self.families.items():
            known = self.known[name]
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip() and prompt not in known]
            if not new:
                continue
            llm = self._llm(name, family)
            for prompt in new:  # one by one, so that a prompt's states do not depend on the others
                known[prompt] = llm.encode([_tokenize(llm, name, prompt)])[0]
            if not keep_llms:
                del self.llms[name]

    def _llm(self, name: str, family: Family) -> TextEncoder:
        if name not in self.llms:
            self.llms[name] = self._load(family)
        return self.llms[name]

    def spans(self, prompt: str, without: Sequence[str] = ()) -> list[list[tuple[int, int]]]:
        """For each LLM, where in the prompt each token stands that `texts` gives after the prefix; (0, 0) = nowhere."""
        return [
            [(0, 0)] * len(self.constants[name].null) if name in without else self._llm(name, family).spans(prompt)
            for name, family in self.families.items()
        ]

    def texts(
        self, prompts: Sequence[str], dtype: torch.dtype, quantised: bool = False, without: Sequence[str] = ()
    ) -> list[Text]:
        """The prompts as the network reads them, one `Text` per LLM; an empty prompt is the null caption.

        Args:
            prompts: one per picture.
            dtype: of the states.
            quantised: take the states through the family's quantisation first, as training saw them.
            without: families that get the null caption.
        """
        self.read(prompts)
        make = _quantized_text if quantised else text_from_states
        return [
            make(
                [known[prompt] if prompt.strip() and name not in without else None for prompt in prompts],
                self.constants[name],
                dtype,
            )
            for name, known in self.known.items()
        ]


def _tokenize(llm: TextEncoder, name: str, prompt: str) -> list[int]:
    before = llm.truncated
    ids = llm.tokenize([prompt])[0]
    if llm.truncated > before:
        raise UserError(f"prompt {prompt[:40]!r}...: longer than the {llm.config.max_tokens} tokens of {name}: shorten it")
    return ids


def _quantized_text(states: Sequence[Tensor | None], constants: TextConstants, dtype: torch.dtype) -> Text:
    """`text_from_states`, with the states taken through the family's quantisation first."""
    return to_text(pack(states, constants), constants, dtype)
