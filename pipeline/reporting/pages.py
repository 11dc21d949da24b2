"""What the HTML pages share."""

import base64
from pathlib import Path


def inline_png(path: Path) -> str:
    """Return a PNG as a data URI, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
