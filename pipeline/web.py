"""Generate images with a run in a browser: `python -m pipeline.web RUN|EXPORT`.

It needs the extra `web` (gradio). The page listens on this machine only, unless --host says otherwise. It
serves one request at a time and limits sizes, steps, images and the queue. Images are stored as PNG with
their settings in `--out`.

Scripts use the endpoint `/generate`, which has the same limits:

    from gradio_client import Client
    files = Client("http://127.0.0.1:7860").predict("a red apple", seed=3, api_name="/generate")
"""

import argparse
import html
import importlib
import math
import os
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from model.common.dtypes import DTYPES
from model.common.errors import UserError, command
from model.common.extras import require
from model.encoders.latent_spaces import side_downsampling
from pipeline.inference.source import add_weights_options, choose_precision, load_source
from pipeline.inference.studio import (
    MAX_PROMPT_LENGTH,
    NOTHING,
    Column,
    GenerationRequest,
    InteractiveSampler,
    Limits,
)

MAX_HISTORY = 48
"""Maximum number of images in the history gallery."""
MAX_QUEUE = 8
"""Maximum number of waiting requests."""
HIDDEN = "hidden"
"""Value of `visible` for elements that may be shown later.

gradio 6.17 never shows an element of a row that was created with `visible=False`.
"""
STYLE = """
.gallery-container .grid-wrap.grid-wrap { padding-top: 2.4em; min-height: 0; }
.small .grid-container.grid-container { grid-template: auto / repeat(auto-fill, minmax(116px, 1fr)); }
.small .caption-label.caption-label { max-width: 100%; font-size: 0.75rem; padding: 0 4px; }
.min_value.min_value, .max_value.max_value, #files .label-clear-button { display: none; }
"""
"""Labels above the images, as many small images per row as fit, and no empty controls."""
MAPS = "Maps of the first image: attention per word as a share of the whole text, expected error of patches"
QUEUE = "sampler"
"""The page and the endpoint for scripts wait for each other: the samplers share one GPU."""


def publish(column: Column) -> list[str]:
    """Copy a column's images to where gradio may serve files from; nothing else of `--out` is served."""
    processing: Any = importlib.import_module("gradio.processing_utils")
    folder = importlib.import_module("gradio.utils").get_upload_folder()
    return [processing.save_file_to_cache(path, folder) for path in column.files]


def show_maps(column: Column) -> Any:
    """Return the gallery of maps, which is hidden if it is empty."""
    gr: Any = importlib.import_module("gradio")
    return gr.Gallery(column.maps, visible=bool(column.maps) or HIDDEN)


def build_page(studio: InteractiveSampler) -> Any:
    """Return the page, as gradio Blocks."""
    # gradio is an optional extra, so this module has to import without it
    gr: Any = importlib.import_module("gradio")
    gallery = partial(gr.Gallery, format="png", object_fit="contain", buttons=["download", "fullscreen"])
    small = partial(gallery, fit_columns=False, height="auto", visible=HIDDEN, elem_classes="small")
    title = ", ".join(Path(name).name for name in studio.samplers)

    with gr.Blocks(
        title=f"LI-DiT: {title}", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    ) as page:
        gr.Markdown(f"# LI-DiT: {title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                controls, generate = _build_controls(gr, studio)
            with gr.Column(scale=3, min_width=320):
                first = gallery(label="Images", elem_id="pictures")
                maps = small(label=MAPS, elem_id="maps")
            with gr.Column(scale=3, min_width=320, visible=HIDDEN) as second_column:
                second = gallery(label="To compare", elem_id="compared")
                other_maps = small(label=MAPS, elem_id="compared-maps")
        files = gr.Files(
            label="Download (PNG with prompt and settings)",
            elem_id="files",
            interactive=False,
            visible=HIDDEN,
        )
        history = small(label="History", elem_id="history")

        # per browser session: users do not see each other's images
        past = gr.State([])

        def run(past_files: list[tuple[str, str]], *values: Any) -> Any:
            request = GenerationRequest(*values)
            try:
                columns = studio.generate(request)
            except UserError as error:
                # gr.Error would leave gradio 6.17's spinners on the images forever;
                # escaped, since the message quotes the prompt and is shown as HTML
                gr.Warning(html.escape(str(error)), title="Error")
                return gr.skip()

            shown = [publish(column) for column in columns]
            paths = list(chain.from_iterable(shown))
            # newest first
            past_files = [*((path, request.prompt) for path in paths), *past_files][:MAX_HISTORY]

            return (
                shown[0],
                show_maps(columns[0]),
                gr.Column(visible=len(columns) > 1 or HIDDEN),
                shown[-1],
                show_maps(columns[-1]),
                gr.Files(paths, interactive=False, visible=True),
                gr.Gallery(past_files, visible=True),
                past_files,
            )

        prompt = controls[0]
        outputs = [first, maps, second_column, second, other_maps, files, history, past]
        gr.on(
            [generate.click, prompt.submit],
            run,
            [past, *controls],
            outputs,
            concurrency_limit=1,
            concurrency_id=QUEUE,
            api_visibility="private",
        )
        _add_endpoint(gr, studio)
    # closed to direct requests, which would not wait in the queue
    return page.queue(max_size=MAX_QUEUE, api_open=False)


def _add_endpoint(gr: Any, studio: InteractiveSampler) -> None:
    """Add the endpoint for scripts. Its values come unchecked from the network, as the page's do."""
    sampler = next(iter(studio.samplers.values()))
    defaults = sampler.defaults
    steps = min(defaults.steps, studio.limits.steps)
    names = sampler.schedulers

    def generate(
        prompt: str,
        negative: str = "",
        height: int = defaults.height,
        width: int = defaults.width,
        steps: int = steps,
        guidance: float = defaults.guidance,
        seed: int = defaults.seed,
        images: int = 1,
        scheduler: str = names[0],
        part: str = "",
        user: str = "",
        user_guidance: float | None = None,
    ) -> list[dict[str, Any]]:
        """Generate images of a prompt; the j-th image has seed + j. Returns PNG files."""
        sizes = height, width, steps, guidance, seed, images
        request = GenerationRequest(
            prompt, negative, *sizes, scheduler, part=part, user=user, user_guidance=user_guidance
        )
        try:
            (column,) = studio.generate(request)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        # the form in which gradio's clients know that there is a file to fetch
        return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in publish(column)]

    gr.api(generate, api_name="generate", concurrency_limit=1, concurrency_id=QUEUE)


def _build_controls(gr: Any, studio: InteractiveSampler) -> tuple[list[Any], Any]:
    """Return the inputs, in the order of `GenerationRequest`'s fields, and the button that generates."""
    sampler = next(iter(studio.samplers.values()))
    defaults, limits = sampler.defaults, studio.limits
    # sides that are not multiples of a patch in pixels would be refused after the click
    step = math.lcm(*side_downsampling(sampler.vae.downsampling)) * sampler.network.sizes.patch
    slider = partial(gr.Slider, buttons=[])
    text = partial(gr.Textbox, max_length=MAX_PROMPT_LENGTH)

    prompt = text(label="Prompt", lines=3, max_lines=8, elem_id="prompt")
    negative = text(label="Negative prompt", max_lines=4, elem_id="negative")
    generate = gr.Button("Generate", variant="primary", elem_id="draw")
    with gr.Row():
        height = slider(step, limits.side, defaults.height, step=step, label="Height", elem_id="height")
        width = slider(step, limits.side, defaults.width, step=step, label="Width", elem_id="width")
    with gr.Row():
        # a run's default may exceed the page's limit
        default_steps = min(defaults.steps, limits.steps)
        steps = slider(1, limits.steps, default_steps, step=1, label="Steps", elem_id="steps")
        guidance = slider(0, 30, defaults.guidance, step=0.1, label="Guidance")
    with gr.Row():
        seed = gr.Number(defaults.seed, precision=0, label="Seed", elem_id="seed")
        images = slider(1, limits.images, 1, step=1, label="Images", elem_id="images")
    with gr.Row():
        schedulers = sampler.schedulers
        scheduler = gr.Dropdown(schedulers, value=schedulers[0], label="Scheduler")
        compare = gr.Dropdown(studio.comparisons, value=NOTHING, label="Compare with", elem_id="compare")
    parts = studio.parts or [""]
    part = gr.Dropdown(
        parts, value=parts[0], label="Part of the network", visible=len(parts) > 1, elem_id="part"
    )
    users = studio.users
    with gr.Row(visible=bool(users)):
        user = gr.Dropdown(["", *users], value="", label="User (empty: nobody)", elem_id="user")
        user_guidance = gr.Number(
            None, minimum=0, maximum=30, label="Guidance of the user (empty: that of the text; 0: nobody)"
        )
    label = "Attention per word, at step (0: none)"
    attention = slider(0, default_steps, 0, step=1, label=label, elem_id="attention")
    has_head = sampler.network.sizes.difficulty != "none"
    difficulty = gr.Checkbox(False, label="Expected error of patches", visible=has_head, elem_id="difficulty")

    def limit_step(maximum: Any, value: Any) -> Any:
        if not isinstance(maximum, int) or not isinstance(value, int):
            return gr.skip()  # the request is refused later, in words
        return gr.Slider(maximum=maximum, value=min(value, maximum))

    # attention can be shown at any of the steps
    steps.change(
        limit_step,
        [steps, attention],
        attention,
        show_progress="hidden",
        api_visibility="private",
    )
    controls = [
        prompt, negative, height, width, steps, guidance, seed, images, scheduler, compare, attention,
        difficulty, part, user, user_guidance,
    ]  # fmt: skip
    for control in controls:
        # `InteractiveSampler` checks the values, in a sentence where gradio's own checks end in a traceback
        control.preprocess = lambda value: value

    return controls, generate


def serve(studio: InteractiveSampler, host: str, port: int | None, **options: Any) -> tuple[Any, str]:
    """Open the page. It loads nothing from any other host.

    Args:
        studio: generates the images.
        host: address to listen on.
        port: port to listen on; None = the first free one.
        options: options of gradio's `launch`.

    Returns:
        The page and its address.

    Raises:
        UserError: if the port is taken.
    """
    gr: Any = importlib.import_module("gradio")
    # the default theme loads fonts from another host
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _bypass_proxy(host)
    page = build_page(studio)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            # a public link of gradio would let anyone on the internet generate images here
            share=False,
            footer_links=[],
            theme=theme,
            css=STYLE,
            ssr_mode=False,
            # the page has no uploads, so no one may fill the disk through gradio's upload route
            max_file_size=0,
            **options,
        )
    except OSError as error:
        raise UserError(f"port {port} of {host}: {error}: choose another by --port") from error

    return page, address


def _bypass_proxy(host: str) -> None:
    """Keep this machine out of the environment's proxy: gradio asks for its own page before it starts."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = ",".join([*filter(None, [known]), "localhost", "127.0.0.1", host])


@command
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.web",
        description=(__doc__ or "").splitlines()[0],
        epilog="Behind a proxy that serves the page below a path, set GRADIO_ROOT_PATH to that path.",
    )
    parser.add_argument("source", type=Path, metavar="RUN|EXPORT")
    parser.add_argument(
        "--compare", type=Path, metavar="RUN|EXPORT", help="other weights, for a second column"
    )
    add_weights_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: this machine only"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--out", type=Path, help="folder of the images; default: web/ in RUN")
    for name, value in asdict(Limits()).items():
        parser.add_argument(f"--max-{name}", type=int, default=value)
    arguments = parser.parse_args()
    # checked before the network is loaded
    require("web", "gradio")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[choose_precision(arguments.precision, device)]
    sources = [arguments.source, *([arguments.compare] if arguments.compare else [])]
    samplers = {str(source): load_source(source, arguments.weights, device, dtype) for source in sources}

    limits = Limits(arguments.max_side, arguments.max_steps, arguments.max_images)
    out = (arguments.out or arguments.source / "web").resolve()
    serve(InteractiveSampler(samplers, out, limits), arguments.host, arguments.port)


if __name__ == "__main__":
    main()
