"""A page to draw with a run in a browser: `python -m pipeline.web RUN|EXPORT`. Needs the extra `web` (gradio).

It listens on this machine alone unless --host says otherwise, draws one request at a time, and bounds sizes, steps,
pictures and the queue. Pictures are kept as PNG with their settings in `--out`.
"""

import argparse
import importlib
import importlib.util
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.common.dtypes import DTYPES
from model.common.errors import UserError, command
from pipeline.diffusion.solvers import SCHEDULERS
from pipeline.export import load_source
from pipeline.inference.studio import MAX_PROMPT_LENGTH, NOTHING, Column, GenerationRequest, InteractiveSampler, Limits

HISTORY = 48
QUEUE = 8
HIDDEN = "hidden"
"""There, but not shown: gradio 6.17 never shows in a row what it was first told to leave out."""
STYLE = """
.gallery-container .grid-wrap.grid-wrap { padding-top: 2.4em; min-height: 0; }
.small .grid-container.grid-container { grid-template: auto / repeat(auto-fill, minmax(116px, 1fr)); }
.small .caption-label.caption-label { max-width: 100%; font-size: 0.75rem; padding: 0 4px; }
.min_value.min_value, .max_value.max_value, #files .label-clear-button { display: none; }
"""
"""Labels above pictures, not over them; as many small pictures in a row as fit, with their words; no room for what is cut off."""
WORDS = "Attention per word: share of the whole text"


def show(column: Column) -> tuple[list[str], Any]:
    """A column for its two galleries: pictures, and attention per word, hidden where nobody asked for it."""
    gr: Any = importlib.import_module("gradio")
    return [str(path) for path in column.files], gr.Gallery(column.words, visible=bool(column.words) or HIDDEN)


def build_page(studio: InteractiveSampler) -> Any:
    """The page, as gradio Blocks."""
    gr: Any = importlib.import_module("gradio")
    sampler = next(iter(studio.samplers.values()))
    defaults, limits = sampler.defaults, studio.limits
    step = sampler.vae.downsampling * sampler.network.sizes.patch
    gallery = partial(gr.Gallery, format="png", object_fit="contain", buttons=["download", "fullscreen"])
    small = partial(gallery, fit_columns=False, height="auto", visible=HIDDEN, elem_classes="small")
    slider = partial(gr.Slider, buttons=[])
    title = ", ".join(Path(name).name for name in studio.samplers)
    with gr.Blocks(title=f"LI-DiT: {title}", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.Markdown(f"# LI-DiT: {title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, max_length=MAX_PROMPT_LENGTH, elem_id="prompt")
                negative = gr.Textbox(label="Negative prompt", max_lines=4, max_length=MAX_PROMPT_LENGTH, elem_id="negative")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Row():
                    height = slider(step, limits.side, defaults.height, step=step, label="Height", elem_id="height")
                    width = slider(step, limits.side, defaults.width, step=step, label="Width", elem_id="width")
                with gr.Row():
                    steps_now = min(defaults.steps, limits.steps)
                    steps = slider(1, limits.steps, steps_now, step=1, label="Steps", elem_id="steps")
                    guidance = slider(0, 30, defaults.guidance, step=0.1, label="Guidance")
                with gr.Row():
                    seed = gr.Number(defaults.seed, precision=0, label="Seed", elem_id="seed")
                    images = slider(1, limits.images, 1, step=1, label="Pictures", elem_id="images")
                with gr.Row():
                    known = list(SCHEDULERS[sampler.objective.name])
                    scheduler = gr.Dropdown(known, value=known[0], label="Scheduler")
                    compare = gr.Dropdown(studio.comparisons, value=NOTHING, label="Compare with", elem_id="compare")
                label = "Attention per word, at step (0: none)"
                attention = slider(0, steps_now, 0, step=1, label=label, elem_id="attention")
            with gr.Column(scale=3, min_width=320):
                first = gallery(label="Pictures", elem_id="pictures")
                words = small(label=WORDS, elem_id="words")
            with gr.Column(scale=3, min_width=320, visible=HIDDEN) as beside:
                second = gallery(label="To compare", elem_id="compared")
                other_words = small(label=WORDS, elem_id="compared-words")
        files = gr.Files(label="Download (PNG with prompt and settings)", elem_id="files", interactive=False, visible=HIDDEN)
        history = small(label="History", elem_id="history")
        past = gr.State([])

        def run(past_files: list[tuple[str, str]], *values: Any) -> Any:
            request = GenerationRequest(*values)
            try:
                columns = studio.draw(request)
            except UserError as error:
                gr.Warning(str(error), title="Error")  # gr.Error would leave gradio 6.17's spinners on the pictures for ever
                return gr.skip()
            kept = [str(path) for column in columns for path in column.files]
            past_files = [*((path, request.prompt) for path in kept), *past_files][:HISTORY]
            shown = [*show(columns[0]), gr.Column(visible=len(columns) > 1 or HIDDEN), *show(columns[-1])]
            return *shown, gr.Files(kept, interactive=False, visible=True), gr.Gallery(past_files, visible=True), past_files

        inputs = [past, prompt, negative, height, width, steps, guidance, seed, images, scheduler, compare, attention]
        outputs = [first, words, beside, second, other_words, files, history, past]
        gr.on([draw.click, prompt.submit], run, inputs, outputs, concurrency_limit=1, api_visibility="private")
        steps.change(
            lambda most, at: gr.Slider(maximum=most, value=min(at, most)), [steps, attention], attention,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page.queue(max_size=QUEUE)


def serve(studio: InteractiveSampler, host: str, port: int | None, **options: Any) -> tuple[Any, str]:
    """Open the page; nothing in it comes from any other host.

    Args:
        studio: draws.
        host: address to listen on.
        port: to listen on; None = the first free one.
        options: for gradio's `launch`.

    Returns:
        The page and its address.

    Raises:
        UserError: the port is taken.
    """
    gr: Any = importlib.import_module("gradio")
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
    page = build_page(studio)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, allowed_paths=[str(studio.out)], footer_links=[], theme=theme,
            css=STYLE, ssr_mode=False, max_file_size=0, **options,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} of {host}: {error}: choose another by --port") from error
    return page, address


@command
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.web", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="RUN|EXPORT")
    parser.add_argument("--compare", type=Path, metavar="RUN|EXPORT", help="other weights, for a second column")
    parser.add_argument("--weights", default="ema", metavar="ema|raw|DECAY", help="ema = the run's first average")
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
    serve(InteractiveSampler(samplers, out, limits), arguments.host, arguments.port)


if __name__ == "__main__":
    main()
