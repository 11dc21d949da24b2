"""Writing a YAML of settings with a comment above each value, as a new file."""

import os
import secrets
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from model.common.errors import UserError, one_line
from model.common.files import UNFINISHED, naming_full_disk

COMMENT_WIDTH = 100

Line = tuple[str, str]
"""A line of YAML, and the comment above it."""


def as_yaml(lines: Sequence[Line]) -> str:
    """Return lines of YAML, each with its comment above it, at the same indent."""
    written: list[str] = []
    for line, comment in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        written += [f"{indent}# {part}" for part in _wrapped(comment)]
        written += [line] if line else []
    return "\n".join(written) + "\n"


def _wrapped(comment: str) -> list[str]:
    """Return a comment in lines; paths and numbers stay whole."""
    # Comments quote foreign names, in which a line break would end the comment.
    text = one_line(comment)
    return textwrap.wrap(text, COMMENT_WIDTH, break_long_words=False, break_on_hyphens=False)


def as_value(content: Any) -> str:
    """Return a value as YAML in one line."""
    options: dict[str, Any] = {"default_flow_style": True, "allow_unicode": True, "width": 1e9}
    text = yaml.safe_dump([_plain(content)], sort_keys=False, **options).strip()
    # In double quotes, a line break is an escape.
    if "\n" in text:
        text = yaml.safe_dump([_plain(content)], sort_keys=False, default_style='"', **options).strip()
    return text[1:-1]


def _plain(content: Any) -> Any:
    """Return a value in which `${name}` is text, and not a reference to a setting of that name."""
    if isinstance(content, dict):
        return {key: _plain(entry) for key, entry in content.items()}
    return content.replace("${", "\\${") if isinstance(content, str) else content


def refuse_existing(path: Path) -> None:
    """Check that a file to be written does not exist.

    Raises:
        UserError: if it does.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists and is never overwritten: give another --out, or remove it")


def write_new(path: Path, text: str) -> None:
    """Write a file at once, unless there is one; its folder is created.

    Raises:
        UserError: if it exists, or cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with naming_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            # Unlike a rename, a link never replaces a file that another process has just written.
            os.link(temporary, path)
    except OSError as error:
        refuse_existing(path)
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another --out") from error
    finally:
        if temporary.exists():
            temporary.unlink()
