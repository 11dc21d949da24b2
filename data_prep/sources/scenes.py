"""Drawn scenes as a source: their truth is known, and the key of a pair is enough to get it back."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.config import ScenesConfig
from data_prep.dataset.schema import Bucket
from data_prep.scenes.captions import CAPTION_KINDS, SceneCaption, caption_scene
from data_prep.scenes.grammar import Scene, sample_scene
from data_prep.scenes.rendering import encode_png, render_scene
from data_prep.sources.sample import Place, Sample
from model.common.errors import UserError


@dataclass(frozen=True)
class SceneKey:
    """Names one scene of one set at one size, `scene-7-123-64x64`; the scene is a function of it."""

    seed: int
    index: int
    bucket: Bucket

    def __str__(self) -> str:
        return f"scene-{self.seed}-{self.index}-{self.bucket.name}"

    @classmethod
    def parse(cls, key: str) -> "SceneKey":
        """Read back a key, as the column `key` of the pairs holds it.

        Raises:
            ValueError: it is no scene's key.
        """
        found = re.fullmatch(r"scene-(\d+)-(\d+)-(\d+x\d+)", key)
        if found is None:
            raise ValueError(f"not the key of a scene: {key!r}")
        return cls(int(found[1]), int(found[2]), Bucket.parse(found[3]))

    @property
    def scene(self) -> Scene:
        """The truth."""
        return sample_scene(self.seed, self.index, self.bucket.width / self.bucket.height)

    @property
    def captions(self) -> list[SceneCaption]:
        """One of each kind, with what they claim."""
        return [caption_scene(self.scene, kind, self.seed, self.index) for kind in CAPTION_KINDS]

    def render(self) -> np.ndarray:
        """The picture, uint8 [H, W, 3]."""
        return render_scene(self.scene, self.bucket.height, self.bucket.width)


class ScenesSource:
    """Scenes 0 to count - 1 of a seed; a "file" is a range of them, each in one of the dataset's buckets by chance.

    Fields: a caption of each kind (`list`, `sentence`, `paragraph`, `zh`); numbers of `segments`,
    `objects`; `ground`, its pattern.
    """

    addressable = True

    def __init__(self, settings: ScenesConfig, buckets: Sequence[Bucket]) -> None:
        """Draw nothing yet.

        Args:
            settings: which scenes.
            buckets: sizes to draw at.

        Raises:
            UserError: no scenes are asked for.
        """
        if settings.count < 1 or settings.file_rows < 1:
            raise UserError(f"scenes: count={settings.count}, file_rows={settings.file_rows}: set both to at least 1")
        self._settings = settings
        self._buckets = list(buckets)

    def files(self) -> list[str]:
        """Ranges of scenes by their first one."""
        return [f"scenes-{first:012d}" for first in range(0, self._settings.count, self._settings.file_rows)]

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Every scene of the range, drawn."""
        first = int(name.rpartition("-")[2])
        for index in range(first, min(first + self._settings.file_rows, self._settings.count)):
            yield self._sample(index)

    def key(self, index: int) -> SceneKey:
        """The key of scene `index`, which also says in which bucket it is drawn."""
        chosen = np.random.default_rng([self._settings.seed, index, 0]).integers(len(self._buckets))
        return SceneKey(self._settings.seed, index, self._buckets[chosen])

    def _sample(self, index: int) -> Sample:
        key = self.key(index)
        record = {caption.kind: caption.text for caption in key.captions}
        scene = key.scene
        record |= {"segments": len(scene.segments), "objects": len(scene.objects), "ground": scene.ground.pattern}
        return Sample(str(key), encode_png(key.render()), record, Place(path=str(key)))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Draw again."""
        for position, place in enumerate(places):
            yield position, encode_png(SceneKey.parse(place.path).render())
