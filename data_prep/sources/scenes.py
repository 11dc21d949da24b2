"""Rendered scenes as a source: their content is known exactly, and follows from the key of a pair."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from data_prep.config import ScenesConfig
from data_prep.dataset.schema import Bucket
from data_prep.scenes.captions import CAPTION_KINDS, SceneCaption, caption_scene
from data_prep.scenes.contrast import CONTRAST_KINDS, caption_contrast
from data_prep.scenes.grammar import ANY_STYLE, Scene, SceneStyle, combination_of, sample_scene
from data_prep.scenes.rendering import encode_png, render_scene
from data_prep.sources.sample import Inventory, Place, Sample
from model.common.errors import UserError

MIXED = ("list", "negation", "distant", "sentence")
"""Kinds of the captions of `mixed`."""


@dataclass(frozen=True)
class Key:
    """Name of one scene of one set at one size; the scene is a function of it.

    A style other than the default one is at the end, as in `scene-7-123-32x32-1.6`.
    """

    kind: ClassVar[str]
    what: ClassVar[str]
    size: ClassVar[str]
    """Pattern of the bucket's name."""

    seed: int
    index: int
    bucket: Bucket
    style: SceneStyle = ANY_STYLE

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}-{self.index}-{self.bucket.name}{self.style.suffix}"

    @classmethod
    def parse(cls, key: str) -> Self:
        """Read back a key, as stored in the column `key` of the pairs.

        Raises:
            ValueError: if it is not the key of such a scene.
        """
        match = re.fullmatch(rf"{cls.kind}-(\d+)-(\d+)-({cls.size})(-.+)?", key)
        if match is None:
            raise ValueError(f"not the key of {cls.what}: {key!r}")
        return cls(int(match[1]), int(match[2]), Bucket.parse(match[3]), SceneStyle.parse(match[4] or ""))

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.bucket.width / self.bucket.height


class SceneKey(Key):
    """Name of a scene, such as `scene-7-123-64x64`."""

    kind, what, size = "scene", "a scene", r"\d+x\d+"

    @property
    def scene(self) -> Scene:
        """The scene itself."""
        return sample_scene(self.seed, self.index, self.aspect, style=self.style)

    @property
    def captions(self) -> dict[str, SceneCaption]:
        """One caption of each kind, with the facts that it states."""
        scene = self.scene
        captions = {kind: caption_scene(scene, kind, self.seed, self.index) for kind in CAPTION_KINDS}
        contrast = {kind: caption_contrast(scene, kind, self.seed, self.index) for kind in CONTRAST_KINDS}
        return {**captions, **contrast}

    def render(self) -> np.ndarray:
        """Return the image, uint8 [H, W, 3]."""
        return render_scene(self.scene, self.bucket.height, self.bucket.width)


class ScenesSource:
    """Scenes 0 to count - 1 of a seed, each in a random bucket of the dataset; a "file" is a range of them.

    Fields: a caption of each kind (`list`, `sentence`, `paragraph`, `zh`, and `negation` and `distant`, which
    a dataset has to ask for by `captions`); `mixed`, the caption of one of `MIXED` in turn; the numbers of
    `segments` and `objects`; `ground`, the pattern of the ground; `combination`, a number from 0 to 7, of
    which a filter can leave out one (`combination_of`).
    """

    def __init__(self, settings: ScenesConfig, buckets: Sequence[Bucket]) -> None:
        """Prepare the source; nothing is rendered yet.

        Args:
            settings: seed and number of the scenes.
            buckets: sizes to render at.

        Raises:
            UserError: if no scenes are asked for.
        """
        if settings.count < 1 or settings.file_rows < 1:
            counts = f"count={settings.count}, file_rows={settings.file_rows}"
            raise UserError(f"scenes: {counts}: set both to at least 1")
        self._settings = settings
        self._buckets = list(buckets)

    def inventory(self) -> Inventory:
        """Return a name for each range of scenes, by its first scene; there are no files to count."""
        # With leading zeros, the sorted names are in the order of the scenes.
        firsts = range(0, self._settings.count, self._settings.file_rows)
        return Inventory(units=dict.fromkeys((f"scenes-{first:012d}" for first in firsts), 0))

    def version(self, name: str) -> str:
        """Return an empty text: scenes do not change."""
        return ""

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield every scene of the range, rendered."""
        first = int(name.rpartition("-")[2])
        for index in range(first, min(first + self._settings.file_rows, self._settings.count)):
            yield self._sample(index)

    def key(self, index: int) -> SceneKey:
        """Return the key of scene `index`, which includes its bucket."""
        chosen = np.random.default_rng([self._settings.seed, index, 0]).integers(len(self._buckets))
        return SceneKey(self._settings.seed, index, self._buckets[chosen], self._settings.style)

    def _sample(self, index: int) -> Sample:
        # The key is enough to render the scene again, so it is the image's place as well.
        key = self.key(index)
        record = {kind: caption.text for kind, caption in key.captions.items()}
        record["mixed"] = record[MIXED[index % len(MIXED)]]
        scene = key.scene
        record |= {
            "segments": len(scene.segments),
            "objects": len(scene.objects),
            "ground": scene.ground.pattern,
            "combination": combination_of(scene),
        }
        return Sample(str(key), encode_png(key.render()), record, Place(path=str(key)))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Render the scenes again."""
        for position, place in enumerate(places):
            # Has to give the bytes that the plan hashed; otherwise `pairs` drops the row as changed.
            yield position, encode_png(SceneKey.parse(place.path).render())
