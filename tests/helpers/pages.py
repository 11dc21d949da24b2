"""Reading of documentation pages: their code blocks, and the commands in them."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (\S.*)", re.MULTILINE)
PARSERS = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    title: str
    text: str


class Parsed(BaseException):
    """A command line was parsed; nothing after it is to run."""

    def __init__(self, result):
        super().__init__()
        namespace, rest = result if isinstance(result, tuple) else (result, [])
        self.namespace = namespace
        self.unknown = [word for word in rest if word.startswith("-")]
        self.settings = [word for word in rest if "=" in word]


def read_blocks(text):
    return [Block(*match.groups()) for match in FENCE.finditer(text)]


def commands(text):
    """Yield the words of each command in the shell blocks of a page, variables filled in."""
    lines = [
        line
        for block in read_blocks(text)
        if block.language in ("", "sh")
        for line in block.text.splitlines()
    ]
    lines += INDENTED.findall(FENCE.sub("", text))
    # inline code is a command, and not only a name, if it has options
    lines += [code for code in re.findall(r"`((?:python -m|torchrun) [^`]+)`", text) if " --" in code]

    values = {}
    for line in lines:
        for name, value in values.items():
            line = line.replace(f"${name}", value)
        if match := re.fullmatch(r"(\w+)=(\S+)", line):
            values[match[1]] = match[2]
        for part in re.split(r" && |; ", line):
            yield from alternatives(part)


def alternatives(line):
    """Yield the words of a line, or of each line that `a | b` stands for."""
    match = re.search(r"\w+(?: \| \w+)+", line)
    for word in match[0].split(" | ") if match else [""]:
        whole = line.replace(match[0], word) if match else line
        if re.match(r"(?:\w+=\S+ )*(?:python -m|torchrun|sbatch|cluster/|make )", whole):
            yield shlex.split(whole, comments=True)


def parse(module, words):
    """Parse a command's words with its own parser, as its `main` would, and run nothing else.

    Returns:
        Its result as `Parsed`; None for `--help`, and for commands without a parser.
    """
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not re.search(r"ArgumentParser\(", file.read_text()):
        assert not words, f"{module} takes no arguments"
        return None

    depth = 0

    def stopping(method):
        def wrapped(*args, **kwargs):
            # parsers call one another; the outermost call has the whole result
            nonlocal depth
            depth += 1
            try:
                result = method(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed(result)
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in PARSERS:
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [module, *words])
        try:
            importlib.import_module(f"{module}.__main__" if path.is_dir() else module).main()
        except Parsed as parsed:
            return parsed
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{module}: the parser refuses {shlex.join(words)}") from end
            return None
    raise AssertionError(f"{module}: parses no command line")
