"""Words and noun phrases of a prompt by spaCy, from which T2I-CompBench makes its questions."""

from dataclasses import dataclass
from typing import Any

from model.common.errors import UserError


@dataclass(frozen=True)
class Parsed:
    """A prompt's grammar."""

    words: tuple[tuple[str, str], ...]
    """(text, part of speech) of each token, by Universal Dependencies: NOUN, ADJ, PROPN, ..."""
    chunks: tuple[str, ...]
    """Noun chunks in order."""


class NounPhrases:
    """A spaCy pipeline."""

    def __init__(self, name: str) -> None:
        """Load the pipeline.

        Args:
            name: an installed pipeline such as `en_core_web_sm`, or its folder.

        Raises:
            UserError: if spaCy or the pipeline is not installed.
        """
        try:
            # An optional dependency: only this benchmark needs it.
            import spacy  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "T2I-CompBench needs spaCy: pip install -c constraints.txt -e '.[eval]'"
            ) from error

        try:
            self.pipeline: Any = spacy.load(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--phrases {name}: no such spaCy pipeline: install en_core_web_sm or give its folder"
            ) from error

        # From the pipeline itself, because `name` may be a folder, which says nothing about the version.
        meta = self.pipeline.meta
        self.identity = {
            "name": f"{meta['lang']}_{meta['name']}",
            "revision": meta["version"],
            "library": f"spacy {spacy.__version__}",
        }

    def parse(self, prompt: str) -> Parsed:
        """Return the prompt's words and noun chunks."""
        document = self.pipeline(prompt)
        words = tuple((word.text, word.pos_) for word in document)
        return Parsed(words, tuple(str(chunk) for chunk in document.noun_chunks))
