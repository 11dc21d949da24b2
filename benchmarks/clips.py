"""Speed of the preparation of clips, and of a plain PyAV loop, on the same videos in one run.

    python -m benchmarks.clips [--videos 16] [--copies 12] [--seconds 8] [--workers 2] [--tiny]

Makes a few H.264 videos of 1280 x 720 at 30 frames per second by code (a textured field that pans, ffmpeg's
default groups of frames and B-frames), packs each several times into a tar, and measures: a plain loop in one
process (decode until the clip is complete, convert to RGB, resize and crop each of its frames with Pillow's
bicubic filter, write H.264 with the same settings); and `plan` and `pairs`, from the tar to committed parts.
Both take the middle frames at half the rate. They are compared by clips per second of CPU time, since the
loop's codecs use several threads and ours several processes.

Then `pairs` reads one video that is eight times as long: peak memory must not grow by more than its bytes.
Memory is the sum over all processes, above what this one used before, sampled every 20 ms.
"""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_prep.clips.timing import Choice
from data_prep.clips.video import ENCODER_PRESET, open_video
from data_prep.config import BucketConfig, ClipsConfig, DatasetConfig, DedupeConfig, SourceConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.images import resize_crop
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import open_store
from model.common.share import Share

GOAL = 1.3
FPS = 30
LONGER = 8
"""Length of the long video, in lengths of the others."""
PLAIN = "plain loop: decode, resize, write"
PLAN, PAIRS, LONG = "ours: plan", "ours: pairs", "ours: pairs, one long video"
HEADER = "| | processes | clips/s | frames/s | CPU ms per clip | frames per CPU second | peak memory, MB |"


def make_video(seed: int, seconds: float, height: int, width: int) -> bytes:
    """Return an H.264 video of a textured field that pans over the whole length."""
    rng = np.random.default_rng(seed)
    frames = round(seconds * FPS)
    size = (width + 2 * frames, height + frames)
    field = Image.fromarray(rng.integers(0, 256, (14, 24, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = Image.fromarray(rng.integers(64, 192, (size[1] // 3, size[0] // 3, 3), np.uint8)).resize(size)
    picture = np.asarray(Image.blend(field, grain, 0.25))

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            view = np.ascontiguousarray(picture[number : number + height, 2 * number : 2 * number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def choose(data: bytes, clips: ClipsConfig) -> Choice:
    """Return the frames that the preparation takes of a video."""
    with open_video(data) as video:
        return video.timeline.choose(clips.frames[0], clips.fps, clips.start, ())


def plain_loop(videos: list[bytes], choices: list[Choice], bucket: Bucket, crf: int, folder: Path) -> None:
    """Cut, resize and store the clips as a simple script would."""
    for number, (data, choice) in enumerate(zip(videos, choices, strict=True)):
        wanted = set(choice.indices)
        clip = []
        with av.open(io.BytesIO(data), "r") as source:
            for index, frame in enumerate(source.decode(video=0)):
                if index in wanted:
                    clip.append(resize_crop(frame.to_image(), bucket)[0])
                if len(clip) == len(wanted):
                    break

        with av.open(str(folder / f"{number:06d}.mp4"), "w") as target:
            options = {"crf": str(crf), "preset": ENCODER_PRESET}
            rate = Fraction(choice.fps).limit_denominator(1001)
            stream = target.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = bucket.height, bucket.width, "yuv444p"
            for image in clip:
                target.mux(stream.encode(av.VideoFrame.from_image(image)))
            target.mux(stream.encode(None))


def write_source(folder: Path, videos: list[bytes]) -> None:
    """Write the videos as one tar, with a caption each."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, video in enumerate(videos):
            for suffix, data in (("mp4", video), ("txt", f"a field that pans, {number}".encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class Table:
    """Rows of the table, printed as they come."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self.rows: dict[str, dict[str, float]] = {}
        print(HEADER)
        print("|---|---|---|---|---|---|---|")

    def record(self, name: str, processes: int, clips: int, step: Callable[[], object]) -> None:
        """Run a step over some clips, and print its row."""
        from benchmarks.pairs import timed

        seconds, busy, memory = timed(step)
        self.rows[name] = {
            "clips_per_s": clips / seconds,
            "frames_per_s": clips * self._frames / seconds,
            "cpu_ms_per_clip": busy / clips * 1e3,
            "frames_per_cpu_s": clips * self._frames / max(busy, 1e-9),
            "peak_mb": memory,
        }
        cells = " | ".join(f"{value:.1f}" for value in self.rows[name].values())
        print(f"| {name} | {processes} | {cells} |", flush=True)


def main() -> None:
    """Measure all, print a table and one line of JSON."""
    # Here, because worker processes import this file again, and these import torch.
    from benchmarks.reporting import at_least, at_most, conditions, print_goals

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument(
        "--copies", type=int, default=12, help="of each video, since starts of processes count too"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a video")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument(
        "--tiny", action="store_true", help="a trial of a few seconds, which measures nothing"
    )
    arguments = parser.parse_args()
    height, width = 720, 1280
    if arguments.tiny:
        arguments.videos, arguments.seconds, arguments.resolution, arguments.frames = 2, 1.0, 64, 5
        arguments.copies = 1
        height, width = 180, 320

    videos = [make_video(seed, arguments.seconds, height, width) for seed in range(arguments.videos)]
    clips = ClipsConfig(frames=[arguments.frames], fps=FPS / 2)
    size = sum(map(len, videos)) / len(videos) / 1e6
    print(f"{len(videos)} videos of {height} x {width}, {arguments.seconds:g} s and {size:.2f} MB each,")
    print(f"{arguments.copies} times, to clips of {arguments.frames} frames of {arguments.resolution} px")
    videos *= arguments.copies
    bucket = Bucket(arguments.resolution, arguments.resolution, arguments.frames)
    choices = [choose(data, clips) for data in videos]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "in", videos)
        (folder / "plain").mkdir()
        config = DatasetConfig(
            name="benchmark",
            store=str(folder / "store"),
            sources=[SourceConfig(path=str(folder / "in"), captions={"original": "txt"})],
            buckets=BucketConfig(resolution=arguments.resolution, max_aspect=1.0),
            clips=clips,
            dedupe=DedupeConfig(exact=False),
            part_rows=64,
            workers=arguments.workers,
        )
        table = Table(arguments.frames)
        table.record(
            PLAIN, 1, len(videos), lambda: plain_loop(videos, choices, bucket, clips.crf, folder / "plain")
        )
        store = open_store(config.store, create=True)
        dataset = store.sub(config.name)
        table.record(PLAN, arguments.workers, len(videos), lambda: run_plan(config, dataset, Share()))
        table.record(PAIRS, arguments.workers, len(videos), lambda: run_pairs(config, dataset, Share()))

        long = make_video(999, LONGER * arguments.seconds, height, width)
        write_source(folder / "long", [long])
        sources = [replace(config.sources[0], path=str(folder / "long"))]
        other = replace(config, name="long", sources=sources)
        larger = store.sub(other.name)
        run_plan(other, larger, Share())
        table.record(LONG, arguments.workers, 1, lambda: run_pairs(other, larger, Share()))

    rows = table.rows
    ours = rows[PLAN]["cpu_ms_per_clip"] + rows[PAIRS]["cpu_ms_per_clip"]
    growth = rows[LONG]["peak_mb"] - rows[PAIRS]["peak_mb"]
    goals = {
        "clips per CPU second, plan and pairs / plain loop": at_least(
            rows[PLAIN]["cpu_ms_per_clip"] / ours, GOAL
        ),
        # The worker's copy, the one that was sent, and the one that was read.
        "MB that a long video adds / MB of its file": at_most(growth / (len(long) / 1e6), 3.0),
    }
    for goal, value in goals.items():
        print(f"{goal}: {value}")
    print(conditions())
    figures = {name: {key: round(value, 2) for key, value in row.items()} for name, row in rows.items()}
    print_goals(
        "clips", goals, videos=len(videos), workers=arguments.workers, tiny=arguments.tiny, results=figures
    )


if __name__ == "__main__":
    main()
