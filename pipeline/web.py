"""A page to draw with a run in a browser: `python -m pipeline.web RUN|EXPORT`. Needs the extra `web` (gradio).

It listens on this machine alone unless --host says otherwise, draws one request at a time, and bounds sizes, steps,
pictures and the queue. Pictures are kept as PNG with their settings in `--out`.
"""

import argparse
import importlib
import importlib.util
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError, command
from pipeline.export import load_source
from pipeline.pictures import save_png, to_images
from pipeline.sampler import DTYPES, Drawing, Sampler
from pipeline.sampling import SCHEDULERS

HISTORY = 48
QUEUE = 8
LONGEST_PROMPT = 4000
NOTHING = "nothing"
OTHER = "the other weights"
NO_INSTRUCTION = "no instruction"
WITHOUT = "without "


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    side: int = 1024
    steps: int = 100
    images: int = 8


@dataclass(frozen=True)
class Request:
    """What the page sends."""

    prompt: str
    negative: str
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    images: int
    scheduler: str
    compare: str = NOTHING


class Studio:
    """Draws requests, one at a time, and keeps the pictures."""

    def __init__(self, samplers: Mapping[str, Sampler], out: Path, limits: Limits) -> None:
        """Prepare the folder.

        Args:
            samplers: by name; the first draws, the second, if there is one, is to compare with.
            out: folder of the pictures.
            limits: of a request.
        """
        self.samplers = dict(samplers)
        self.out = out
        self.limits = limits
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def comparisons(self) -> list[str]:
        """What a second column can show."""
        llms = list(next(iter(self.samplers.values())).reader.families)
        without = [f"{WITHOUT}{llm}" for llm in llms] if len(llms) > 1 else []
        return [NOTHING, *([OTHER] if len(self.samplers) > 1 else []), NO_INSTRUCTION, *without]

    def draw(self, request: Request) -> tuple[list[Path], list[Path]]:
        """Draw a request, and the same changed in one thing to compare with: files of the pictures of both columns.

        Raises:
            UserError: the request is out of bounds or cannot be drawn; nothing was drawn then.
        """
        self._check(request)
        (name, sampler), *others = self.samplers.items()
        drawing = Drawing(
            request.steps, request.guidance, request.height, request.width, request.scheduler, request.negative.strip()
        )
        columns = [(name, sampler, drawing)]
        if request.compare == OTHER:
            columns.append((*others[0], drawing))
        elif request.compare == NO_INSTRUCTION:
            columns.append((name, sampler, Drawing(**{**vars(drawing), "instruction": False})))
        elif request.compare != NOTHING:
            without = (request.compare.removeprefix(WITHOUT),)
            columns.append((name, sampler, Drawing(**{**vars(drawing), "without": without})))
        for _, each, settings in columns:
            each.check(settings)
        with self._lock:
            drawn = [self._draw_column(*column, request) for column in columns]
        return drawn[0], drawn[1] if len(drawn) > 1 else []

    def _check(self, request: Request) -> None:
        limits = self.limits
        for value, most, what in (
            (request.height, limits.side, "height"),
            (request.width, limits.side, "width"),
            (request.steps, limits.steps, "steps"),
            (request.images, limits.images, "images"),
        ):
            if not 1 <= value <= most:
                raise UserError(f"{what}={value}: choose 1 to {most}")
        if not request.prompt.strip():
            raise UserError("the prompt is empty: say what to draw")
        if max(len(request.prompt), len(request.negative)) > LONGEST_PROMPT:
            raise UserError(f"the prompt has more than {LONGEST_PROMPT:,} characters: shorten it")
        if not 0 <= request.guidance <= 30:
            raise UserError(f"guidance={request.guidance}: choose 0 to 30")
        if not 0 <= request.seed < 2**53:
            raise UserError(f"seed={request.seed}: choose a whole number from 0 to 2^53 - 1")
        if request.compare not in self.comparisons:
            raise UserError(f"compare={request.compare}: choose {', '.join(self.comparisons)}")

    def _draw_column(self, name: str, sampler: Sampler, drawing: Drawing, request: Request) -> list[Path]:
        prompt = request.prompt.strip()
        seeds = [request.seed + number for number in range(request.images)]
        images = to_images(sampler.pixels(sampler.latents([prompt] * len(seeds), seeds, drawing)))
        files: list[Path] = []
        for seed, image in zip(seeds, images, strict=True):
            path = self.out / f"{time.time_ns()}_{seed}.png"
            save_png(image, path, {"prompt": prompt, "seed": seed, "source": name, **asdict(drawing)})
            files.append(path)
        return files


def build_page(studio: Studio) -> Any:
    """The page, as gradio Blocks."""
    gr: Any = importlib.import_module("gradio")
    sampler = next(iter(studio.samplers.values()))
    defaults, limits = sampler.defaults, studio.limits
    step = sampler.vae.downsampling * sampler.network.sizes.patch
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
    with gr.Blocks(title="LI-DiT", analytics_enabled=False, theme=theme) as page:
        gr.Markdown(f"## LI-DiT: {', '.join(studio.samplers)}")
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox(label="Prompt", lines=3, max_length=LONGEST_PROMPT, elem_id="prompt")
                negative = gr.Textbox(label="Negative prompt", max_length=LONGEST_PROMPT)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Row():
                    height = gr.Slider(step, limits.side, defaults.height, step=step, label="Height")
                    width = gr.Slider(step, limits.side, defaults.width, step=step, label="Width")
                with gr.Row():
                    steps = gr.Slider(1, limits.steps, min(defaults.steps, limits.steps), step=1, label="Steps")
                    guidance = gr.Slider(0, 30, defaults.guidance, step=0.1, label="Guidance")
                with gr.Row():
                    seed = gr.Number(defaults.seed, precision=0, label="Seed", elem_id="seed")
                    images = gr.Slider(1, limits.images, 1, step=1, label="Pictures")
                known = list(SCHEDULERS[sampler.objective.name])
                scheduler = gr.Dropdown(known, value=known[0], label="Scheduler")
                compare = gr.Dropdown(studio.comparisons, value=NOTHING, label="Compare with")
            with gr.Column(scale=1):
                first = gr.Gallery(label="Pictures", columns=2, format="png", elem_id="pictures", object_fit="contain")
            with gr.Column(scale=1, visible=False) as beside:
                second = gr.Gallery(label="To compare", columns=2, format="png", elem_id="compared", object_fit="contain")
        files = gr.Files(label="Download (PNG with prompt and settings)", elem_id="files")
        history = gr.Gallery(label="History", columns=8, height=220, format="png", elem_id="history", object_fit="contain")
        past = gr.State([])

        def run(past_files: list[str], *values: Any) -> tuple[Any, ...]:
            try:
                left, right = studio.draw(Request(*values))
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error
            kept = [str(path) for path in [*left, *right]]
            past_files = [*kept, *past_files][:HISTORY]
            column = gr.Column(visible=bool(right))
            return [str(path) for path in left], [str(path) for path in right], column, kept, past_files, past_files

        inputs = [past, prompt, negative, height, width, steps, guidance, seed, images, scheduler, compare]
        outputs = [first, second, beside, files, history, past]
        gr.on([draw.click, prompt.submit], run, inputs, outputs, concurrency_limit=1)
    return page.queue(max_size=QUEUE)


@command
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.web", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="RUN|EXPORT")
    parser.add_argument("--compare", type=Path, metavar="RUN|EXPORT", help="other weights, for a second column")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: web/ in RUN")
    for name, value in asdict(Limits()).items():
        parser.add_argument(f"--max-{name}", type=int, default=value)
    arguments = parser.parse_args()
    if importlib.util.find_spec("gradio") is None:
        raise UserError("package gradio is missing: install the extra, pip install -e '.[web]'")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[arguments.precision or ("bf16" if device.type == "cuda" else "fp32")]
    sources = [arguments.source, *([arguments.compare] if arguments.compare else [])]
    samplers = {str(source): load_source(source, arguments.weights, device, dtype) for source in sources}
    limits = Limits(arguments.max_side, arguments.max_steps, arguments.max_images)
    out = (arguments.out or arguments.source / "web").resolve()
    page = build_page(Studio(samplers, out, limits))
    try:
        page.launch(server_name=arguments.host, server_port=arguments.port, share=False, allowed_paths=[str(out)], show_api=False)
    except OSError as error:
        raise UserError(f"port {arguments.port} of {arguments.host}: {error}: choose another by --port") from error


if __name__ == "__main__":
    main()
