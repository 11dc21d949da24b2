"""Videos, through PyAV: the only file that imports it.

Times of all frames are read from the packets without decoding, so the frames of a clip are known before any
is decoded. Decoding starts at the keyframe before the first of them. Memory holds the packets' times, one
decoded frame and the clip at its final size, whatever the length of the video; and the file, unless it is
large: those are read in ranges.
"""

import io
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from data_prep.clips.large_file import HEAD_BYTES, MAX_VIDEO_BYTES, LargeFile, Media
from data_prep.clips.timing import Timeline
from data_prep.dataset.schema import Bucket
from data_prep.images.images import DAMAGED, MAX_FILE_BYTES, TOO_LARGE, Crop, ImageError
from model.common.errors import UserError
from model.common.extras import require

ENCODER_PRESET = "veryfast"
MAX_STORED_BYTES = 1 << 30
"""Bytes of the pixels of a stored clip: more is no clip of ours."""
SCALING = 4 | 1 << 13 | 1 << 14 | 1 << 18
"""Flags of ffmpeg's scaler: bicubic, chroma at full resolution inside, accurate rounding. Without the last,
all colors are one level too dark."""

NO_VIDEO = "clip: no video"
UNKNOWN_CODEC = "clip: unknown codec"
UNKNOWN_CONTAINER = "clip: unknown kind of file"
NO_FRAMES = "clip: no frames"
NO_KEYFRAME = "clip: no keyframe"
NO_TIMES = "clip: frames without times"
CUT_SHORT = "clip: cut short"
BROKEN = "clip: damaged"
PIXEL_FORMAT = "clip: pixel format"
HDR = "clip: high dynamic range"
TOO_MANY = "clip: too many frames"
TOO_FAR = "clip: too far from a keyframe"
MAX_FRAMES = 1 << 22
"""19 hours at 60 frames per second; their times take 34 MB."""
MAX_FRAME_PIXELS = 1 << 25
"""7680 x 4320. A decoder may keep 16 frames for others to refer to, 0.8 GB of this size."""
MAX_DECODED_PIXELS = 1 << 35
"""Pixels of all frames from the keyframe before a clip to its end: 37,000 frames of 1280 x 720, about two
minutes. Without a limit, a video of one group of millions of frames would keep a worker for days."""
CODECS = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mjpeg", "ffv1", "prores"}
"""Decoders that are used. The others, some hundred, are seldom tested and have a large attack surface."""
SKIPPING = {"h264", "hevc"}
"""Decoders that leave out frames to which no other refers, about half of them, if that is set."""
HDR_TRANSFERS = {16, 18}
"""Transfers of PQ and HLG: without tone mapping such a video looks pale."""
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""Color matrix of a frame -> the name that the scaler has for it."""
HD_HEIGHT = 720
"""Videos that name no matrix have BT.709 from this height on, and BT.601 below."""
EBML = b"\x1aE\xdf\xa3"
SEGMENT = b"\x18S\x80g"


def pyav() -> ModuleType:
    """Import PyAV, without its messages.

    Raises:
        UserError: if it is not installed.
    """
    require("video", "av")
    import av
    import av.logging

    # ffmpeg writes a line per odd frame, which would fill the log of a large dataset.
    av.logging.set_level(None)
    return av


def is_video(data: bytes) -> bool:
    """True if a file starts like a video that is read: mp4, QuickTime, Matroska or WebM."""
    return is_mp4(data) or data.startswith(EBML)


def is_mp4(data: bytes) -> bool:
    """True if a file starts like an mp4 or QuickTime file; AVIF and HEIC, which are images, do too."""
    return data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"mif1", b"heic", b"heix")


def encode_mp4(frames: np.ndarray, fps: float, crf: int, chroma: str) -> bytes:
    """Encode a clip as H.264; equal arguments give equal bytes.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        crf: constant rate factor.
        chroma: pixel format.

    Raises:
        UserError: if PyAV is not installed.
    """
    av = pyav()

    buffer = io.BytesIO()
    # One thread: the number of threads changes the bytes. So does x264's tree of macroblocks (0.165, mostly
    # with B-frames: 21 different files in 25 runs), whose vector code reads memory that it has not written.
    options = {"crf": str(crf), "preset": ENCODER_PRESET, "x264-params": "bframes=0:mbtree=0"}
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = chroma
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1  # BT.709, studio range

        reformatter = av.video.reformatter.VideoReformatter()
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = reformatter.reformat(
                picture,
                format=chroma,
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation=SCALING,
                threads=1,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode_mp4(data: bytes) -> np.ndarray:
    """Decode all frames of what `encode_mp4` wrote, uint8 [T, H, W, 3].

    Raises:
        ImageError: if the file is damaged.
        UserError: if PyAV is not installed.
    """

    av = pyav()
    frames: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            size = 3 * stream.codec_context.height * stream.codec_context.width

            reformatter = av.video.reformatter.VideoReformatter()
            for frame in container.decode(stream):
                if (len(frames) + 1) * size > MAX_STORED_BYTES:
                    raise ImageError(DAMAGED, "too many frames")
                picture = reformatter.reformat(
                    frame, format="rgb24", src_colorspace="ITU709", interpolation=SCALING, threads=1
                )
                frames.append(picture.to_ndarray())
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ImageError(DAMAGED, f"{type(error).__name__}: {error}"[:200]) from error

    return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


class Video:
    """An opened video, with the times of its frames."""

    def __init__(self, data: Media, container: Any, stream: Any) -> None:
        """Read the times of all frames from the packets.

        Args:
            data: the file.
            container: the opened file.
            stream: its video.

        Raises:
            ImageError: if there is no frame, or one without a time, or the times are absurd.
        """
        self._data, self._container, self._stream = data, container, stream
        # As integers of Python, the times of the longest video would take 150 MB.
        times, keys = array("q"), array("q")
        packets, latest, last = 0, None, 0

        for packet in container.demux(stream):
            if not packet.size:
                continue  # marks the end
            packets += 1
            if packets > MAX_FRAMES:
                raise ImageError(TOO_MANY, f"more than {MAX_FRAMES:,}")
            # Edit lists hide frames that only others are decoded from.
            if packet.is_discard:
                continue
            if packet.pts is None:
                raise ImageError(NO_TIMES)
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
            if latest is None or packet.pts >= latest:
                latest, last = packet.pts, packet.duration or 0

        # mp4 announces the number of frames, Matroska the size of the file.
        if packets < stream.frames:
            raise ImageError(CUT_SHORT, f"{packets} of {stream.frames} frames")
        announced = _matroska_end(_head(data))
        if announced > len(data):
            raise ImageError(CUT_SHORT, f"{len(data)} of {announced} bytes")

        if not times:
            raise ImageError(NO_FRAMES)
        if not keys:
            raise ImageError(NO_KEYFRAME, f"{len(times)} frames")

        self._keys = sorted(keys)
        self.timeline = Timeline.of(times, last, Fraction(stream.time_base))

    @property
    def height(self) -> int:
        """Height of the upright frames."""
        return self._size[0]

    @property
    def width(self) -> int:
        """Width of the upright frames, in square pixels."""
        return self._size[1]

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Size of the first frame that can be decoded: only frames have their rotation."""
        self._container.seek(self._keys[0], stream=self._stream, backward=True)
        for frame in self._container.decode(self._stream):
            return upright_size(frame, self._stream.sample_aspect_ratio)
        raise ImageError(BROKEN, "no frame can be decoded")

    def read(self, indices: Sequence[int], bucket: Bucket) -> tuple[np.ndarray, Crop]:
        """Return frames of the bucket's size, uint8 [T, H, W, 3], and the crop in pixels of the original.

        Args:
            indices: places in the timeline, ascending; a place may occur several times.
            bucket: height and width.

        Raises:
            ImageError: if a frame cannot be decoded.
        """
        times = [int(self.timeline.times[index]) for index in indices]
        wanted = sorted(set(times))
        # Some containers lead behind the keyframe, or name one that is none.
        pixels = self.decode(wanted, bucket) or self.decode_all(wanted, bucket)

        if pixels is None:
            raise ImageError(BROKEN, f"a frame of {len(wanted)} is missing")
        frames, crop = pixels
        return np.stack([frames[time] for time in times]), crop

    def decode(self, times: Sequence[int], bucket: Bucket) -> tuple[dict[int, np.ndarray], Crop] | None:
        """Decode the frames at some times, from the keyframe before the first of them on.

        Args:
            times: times in units of the timeline, ascending and different.
            bucket: height and width.

        Returns:
            The frames by their time, uint8 [H, W, 3] each, and the crop; None if one did not come.

        Raises:
            ImageError: if a frame is damaged, or has pixels that are not read.
        """
        place = int(np.searchsorted(self._keys, times[0], side="right")) - 1
        self._container.seek(self._keys[max(0, place)], stream=self._stream, backward=True)

        decoded = _decoded(self._container, self._stream, set(times))
        return _fitted(decoded, times, _Fit(self._stream.sample_aspect_ratio, bucket))

    def decode_all(self, times: Sequence[int], bucket: Bucket) -> tuple[dict[int, np.ndarray], Crop] | None:
        """Decode every frame from the start on, and return those at some times as `decode` does."""
        with _opened(self._data) as (container, stream):
            fit = _Fit(stream.sample_aspect_ratio, bucket)
            return _fitted(container.decode(stream), times, fit)


@contextmanager
def open_video(data: Media) -> Iterator[Video]:
    """Open a video.

    Raises:
        ImageError: if it is damaged, or is not read.
        UserError: if PyAV is not installed.
    """
    with _opened(data) as (container, stream):
        yield Video(data, container, stream)


@contextmanager
def _opened(data: Media) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first video stream."""
    if len(data) > (MAX_FILE_BYTES if isinstance(data, bytes) else MAX_VIDEO_BYTES):
        raise ImageError(TOO_LARGE, f"{len(data)} bytes")
    if not is_video(_head(data)):
        raise ImageError(UNKNOWN_CONTAINER)
    av = pyav()
    # Named, so that no other demuxer is tried: a playlist, for one, would open what it names.
    name = "mp4" if is_mp4(_head(data)) else "matroska"
    # Opening decodes a frame only to learn what the container says already: a tenth of all the time.
    options = {"skip_frame": "all"}
    with (
        _faults(),
        io.BytesIO(data) if isinstance(data, bytes) else data.open() as file,
        av.open(file, format=name, options=options, metadata_errors="replace") as container,
    ):
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]

        if not streams:
            raise ImageError(NO_VIDEO)
        context = streams[0].codec_context
        if context is None or context.name not in CODECS:
            raise ImageError(UNKNOWN_CODEC, getattr(context, "name", ""))
        if context.height * context.width > MAX_FRAME_PIXELS:
            raise ImageError(TOO_LARGE, f"{context.height}x{context.width}")

        # The workers are processes, as many as there are cores.
        context.thread_count, context.thread_type = 1, "NONE"
        context.skip_frame = "DEFAULT"
        yield container, streams[0]


def _fitted(
    decoded: Iterable[Any], times: Sequence[int], fit: "_Fit"
) -> tuple[dict[int, np.ndarray], Crop] | None:
    """Return the frames at some times among decoded ones; None if one is missing."""
    frames: dict[int, np.ndarray] = {}
    pixels = 0
    for frame in decoded:
        pixels += frame.width * frame.height
        if pixels > MAX_DECODED_PIXELS:
            raise ImageError(TOO_FAR, f"{frame.height}x{frame.width}")

        time = times[len(frames)]
        if frame.pts is None:
            raise ImageError(NO_TIMES)
        if frame.pts > time:
            return None
        if frame.pts == time:
            if frame.is_corrupt:
                raise ImageError(BROKEN, f"frame {len(frames)} of the clip")
            frames[time] = fit.pixels(frame)
            if len(frames) == len(times):
                return frames, fit.crop
    return None


@contextmanager
def _faults() -> Iterator[None]:
    """Turn every exception into an `ImageError`: decoders of foreign bytes raise all kinds."""
    try:
        yield
    except (ImageError, UserError):
        raise
    except Exception as error:
        raise ImageError(BROKEN, f"{type(error).__name__}: {error}"[:200]) from error


def _decoded(container: Any, stream: Any, wanted: set[int]) -> Iterator[Any]:
    """Yield decoded frames: all that are wanted, and those that others refer to."""
    context = stream.codec_context
    for packet in container.demux(stream):
        # Without threads, a packet is decoded when it is sent, so the setting holds for its frame alone.
        if context.name in SKIPPING:
            context.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
        yield from packet.decode()


def _head(data: Media) -> bytes:
    """Return a file's first bytes."""
    return data.head if isinstance(data, LargeFile) else data[:HEAD_BYTES]


def _matroska_end(data: bytes) -> int:
    """Return the size that a Matroska file announces; 0 if it does not, or is none."""
    if not data.startswith(EBML):
        return 0
    place = len(EBML)
    size, place = _matroska_size(data, place)
    # The header is followed by the segment, which is all the rest.
    place += size
    if data[place : place + 4] != SEGMENT:
        return 0
    size, place = _matroska_size(data, place + 4)
    return place + size if size else 0


def _matroska_size(data: bytes, place: int) -> tuple[int, int]:
    """Return the size of an element and the place of its content; 0 is a size that is not announced."""
    first = data[place] if place < len(data) else 0
    # The number of leading zero bits is that of further bytes; all ones mean unknown, as in live streams.
    length = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + length]) & ((1 << 7 * length) - 1)
    return (0 if value == (1 << 7 * length) - 1 else value), place + length


def turns_of(frame: Any) -> int:
    """Return the quarter turns, counterclockwise, that make a frame upright: 0 to 3."""
    return round(frame.rotation / 90) % 4


def upright_size(frame: Any, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Return height and width of a frame that is upright and has square pixels.

    Args:
        frame: PyAV's frame.
        pixel_aspect: width / height of a pixel; None or 0 = square.
    """
    height, width = frame.height, max(1, round(frame.width * (pixel_aspect or 1)))
    return (width, height) if turns_of(frame) % 2 else (height, width)


class _Fit:
    """Frames of one video, scaled so that they cover a bucket, and cropped to it."""

    def __init__(self, pixel_aspect: Fraction | None, bucket: Bucket) -> None:
        self._pixel_aspect = pixel_aspect
        self._bucket = bucket
        self._reformatter = pyav().video.reformatter.VideoReformatter()
        self.crop = Crop(0, 0, 0, 0)
        """In pixels of the upright original; of the last frame, as all frames have one size."""

    def pixels(self, frame: Any) -> np.ndarray:
        """Return a frame of the bucket's size, uint8 [H, W, 3].

        Raises:
            ImageError: if its pixels are not read.
        """
        if frame.color_trc in HDR_TRANSFERS:
            raise ImageError(HDR, f"transfer {frame.color_trc}")

        bucket = self._bucket
        height, width = upright_size(frame, self._pixel_aspect)
        scale = max(bucket.height / height, bucket.width / width)
        rows, columns = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
        if rows * columns > MAX_FRAME_PIXELS:
            raise ImageError(TOO_LARGE, f"{height}x{width}")

        turns = turns_of(frame)
        sides = (columns, rows) if turns % 2 else (rows, columns)
        pixels = np.rot90(self._scaled(frame, *sides), turns)

        top, left = (rows - bucket.height) // 2, (columns - bucket.width) // 2
        down, right = height / rows, width / columns
        self.crop = Crop(
            left * right, top * down, (left + bucket.width) * right, (top + bucket.height) * down
        )
        return np.ascontiguousarray(pixels[top : top + bucket.height, left : left + bucket.width])

    def _scaled(self, frame: Any, height: int, width: int) -> np.ndarray:
        """Scale a frame and convert it to RGB in one pass."""
        matrix = MATRICES.get(frame.colorspace, 1 if frame.height >= HD_HEIGHT else 5)
        try:
            picture = self._reformatter.reformat(
                frame,
                width=width,
                height=height,
                format="rgb24",
                src_colorspace=matrix,
                interpolation=SCALING,
                threads=1,
            )
            return picture.to_ndarray()
        except Exception as error:
            raise ImageError(PIXEL_FORMAT, f"{frame.format.name}: {error}"[:200]) from error
