"""Moving scenes as a source of clips: their content is known exactly, and follows from the key of a pair."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.clips.media import encode_clip
from data_prep.config import ScenesConfig
from data_prep.dataset.schema import Bucket
from data_prep.scenes.grammar import ANY_STYLE, SceneStyle
from data_prep.scenes.moving import (
    MOVING_CAPTION_KINDS,
    MovingCaption,
    MovingScene,
    caption_moving_scene,
    render_moving_scene,
    sample_moving_scene,
)
from data_prep.sources.sample import Place, Sample
from data_prep.sources.scenes import ScenesSource


@dataclass(frozen=True)
class MovingSceneKey:
    """Name of one moving scene of one set at one size and length, `moving-7-123-64x64x17`.

    A style other than the default one is at the end, as in `moving-7-123-32x32x17-1.6`.
    """

    seed: int
    index: int
    bucket: Bucket
    style: SceneStyle = ANY_STYLE

    def __str__(self) -> str:
        return f"moving-{self.seed}-{self.index}-{self.bucket.name}{self.style.suffix}"

    @classmethod
    def parse(cls, key: str) -> "MovingSceneKey":
        """Read back a key, as stored in the column `key` of the pairs.

        Raises:
            ValueError: if it is not the key of a moving scene.
        """
        match = re.fullmatch(r"moving-(\d+)-(\d+)-(\d+x\d+x\d+)(-.+)?", key)
        if match is None:
            raise ValueError(f"not the key of a moving scene: {key!r}")
        return cls(int(match[1]), int(match[2]), Bucket.parse(match[3]), SceneStyle.parse(match[4] or ""))

    @property
    def scene(self) -> MovingScene:
        """The scene itself."""
        aspect = self.bucket.width / self.bucket.height
        return sample_moving_scene(self.seed, self.index, aspect, self.style)

    @property
    def captions(self) -> list[MovingCaption]:
        """One caption of each kind, with its claims."""
        scene = self.scene
        return [caption_moving_scene(scene, kind, self.seed, self.index) for kind in MOVING_CAPTION_KINDS]

    def render(self) -> np.ndarray:
        """Return the clip, uint8 [T, H, W, 3]."""
        return render_moving_scene(self.scene, self.bucket.frames, self.bucket.height, self.bucket.width)


class MovingScenesSource(ScenesSource):
    """Moving scenes 0 to count - 1 of a seed, each in a random bucket of clips; a "file" is a range of them.

    Fields: a caption of each kind (`list`, `sentence`, `zh`); the number of `objects`; `ground`, the pattern
    of the ground; `motions`, those of the objects in order, joined by `+`.
    """

    def __init__(self, settings: ScenesConfig, buckets: Sequence[Bucket], fps: float) -> None:
        """Prepare the source; nothing is rendered yet.

        Args:
            settings: seed and number of the scenes.
            buckets: sizes and lengths to render at.
            fps: frames per second of all clips.

        Raises:
            UserError: if no scenes are asked for.
        """
        super().__init__(settings, buckets)
        self._fps = fps

    def _sample(self, index: int) -> Sample:
        chosen = self.key(index)

        # The key is enough to render the clip again, so it is the clip's place as well.
        key = MovingSceneKey(chosen.seed, index, chosen.bucket, chosen.style)
        record = {caption.kind: caption.text for caption in key.captions}

        scene = key.scene
        record |= {
            "objects": len(scene.objects),
            "ground": scene.ground.pattern,
            "motions": "+".join(segment.motion for segment in scene.segments),
        }
        return Sample(str(key), self._encode(key), record, Place(path=str(key)))

    def _encode(self, key: MovingSceneKey) -> bytes:
        return encode_clip(key.render(), self._fps, "webp")

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Render the clips again."""
        for position, place in enumerate(places):
            # Has to give the bytes that the plan hashed; otherwise `pairs` drops the row as changed.
            yield position, self._encode(MovingSceneKey.parse(place.path))
