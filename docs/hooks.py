"""Hooks of MkDocs: measurements and all messages become pages, and nothing is loaded from another host."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from docs.make_messages import page as page_of_messages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOADS = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*stylesheet[^>]*//"
)


def results() -> list[Path]:
    """Return the pages of measurements."""
    return sorted(RESULTS.glob("*.md"))


def on_config(config: Any) -> Any:
    """Add the measurements to the navigation."""
    pages = [
        {page.stem.replace("_", " ").capitalize(): f"benchmarks/results/{page.name}"} for page in results()
    ]
    config.nav.append({"Measurements": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the measurements with their figures, which are outside of docs/, and the page of all messages."""
    for path in [*results(), *sorted(RESULTS.glob("*.svg"))]:
        files.append(File.generated(config, f"benchmarks/results/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "messages.md", content=page_of_messages()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make links to the measurements fit the site, where benchmarks/ is below docs/."""
    return markdown.replace("../benchmarks/results/", "benchmarks/results/")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads from another host.

    Raises:
        PluginError: if it does.
    """
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found.group()}")
    return output
