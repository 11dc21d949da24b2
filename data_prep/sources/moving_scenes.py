"""Moving scenes as a source of clips: their content is known exactly, and follows from the key of a pair."""

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.clips.media import encode_clip
from data_prep.config import ScenesConfig
from data_prep.dataset.schema import Bucket
from data_prep.scenes.moving import (
    MOVING_CAPTION_KINDS,
    MovingCaption,
    MovingScene,
    caption_moving_scene,
    combination_of,
    render_moving_scene,
    sample_moving_scene,
)
from data_prep.sources.sample import Place, Sample
from data_prep.sources.scenes import Key, ScenesSource


class MovingSceneKey(Key):
    """Name of a moving scene, with its size and length, such as `moving-7-123-64x64x17`."""

    kind, what, size = "moving", "a moving scene", r"\d+x\d+x\d+"

    @property
    def scene(self) -> MovingScene:
        """The scene itself."""
        return sample_moving_scene(self.seed, self.index, self.aspect, self.style)

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
    of the ground; `motions`, those of the objects in order, joined by `+`; `combination`, a number from 0 to
    7, of which a filter can leave out one (`combination_of`).
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
            "combination": combination_of(scene),
        }
        return Sample(str(key), self._encode(key), record, Place(path=str(key)))

    def _encode(self, key: MovingSceneKey) -> bytes:
        return encode_clip(key.render(), self._fps, "webp")

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Render the clips again."""
        for position, place in enumerate(places):
            # Has to give the bytes that the plan hashed; otherwise `pairs` drops the row as changed.
            yield position, self._encode(MovingSceneKey.parse(place.path))
