"""Write the reference of all settings from the dataclasses: `python -m docs.make_settings`.

Names, types, defaults and ranges are those of the fields, and the text is the docstring below each field. A
test checks that both pages are up to date.
"""

import ast
import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from data_prep.config import DatasetConfig
from data_prep.plan import filters
from model.common.settings import allowed_range
from model.config import DiTConfig
from model.presets import PRESETS
from pipeline.stage.config import ModelConfig, StageConfig

FOLDER = Path(__file__).resolve().parent / "settings"

STAGES = """# Settings of a stage

A stage is one YAML file: one of `pipeline/stages/`, or your own. Any key can be set on the command line, as
in `optim.lr=2e-4`. An unknown key, a wrong type and a number out of range are errors that name the key.
`python -m docs.make_settings` writes this page from the code.
"""
DATASETS = """# Settings of a dataset

A dataset is one YAML file, as in `data_prep/datasets/`. Any key can be set on the command line, as in
`buckets.resolution=512`, also in an entry of a list that the file has: `sources.0.path=...`. An unknown key,
a wrong type and a number out of range are errors that name the key.
`python -m docs.make_settings` writes this page from the code.
"""
HEADER = "| key | type | default | allowed | meaning |\n|---|---|---|---|---|"


class Setting(NamedTuple):
    """One row of the reference."""

    key: str
    kind: str
    default: str
    allowed: str
    meaning: str


class Section(NamedTuple):
    """The settings of one dataclass."""

    path: str
    meaning: str
    settings: list[Setting]


def sections(schema: type, path: str = "", meaning: str = "") -> Iterator[Section]:
    """Yield the section of a dataclass, then those of the dataclasses inside it.

    Args:
        schema: the dataclass.
        path: key of the settings in the YAML; "" = its top.
        meaning: text of the section; "" = the first paragraph of the docstring.
    """
    own, inner = [], []
    texts, hints = field_docstrings(schema), get_type_hints(schema)
    for entry in fields(schema):
        key = f"{path}.{entry.name}" if path else entry.name
        nested, suffix = nested_schema(hints[entry.name])
        if nested is None:
            own.append(describe(schema, entry, hints[entry.name], texts.get(entry.name, "")))
        else:
            inner.append((nested, key + suffix, texts.get(entry.name, "")))

    yield Section(path, meaning or first_paragraph(schema), own)
    for nested, key, text in inner:
        about = " ".join(filter(None, [first_paragraph(nested), text]))
        yield from sections(nested, key, about)


def nested_schema(hint: Any) -> tuple[type | None, str]:
    """Return the dataclass that a field holds, and what its keys have behind the field's name."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint, ""
    for argument in get_args(hint):
        if is_dataclass(argument) and isinstance(argument, type):
            return argument, {list: "[]", dict: ".NAME"}.get(get_origin(hint), "")
    return None, ""


def describe(schema: type, entry: Field[Any], hint: Any, text: str) -> Setting:
    """Return the row of one field."""
    allowed = allowed_range(entry)
    return Setting(
        entry.name, type_name(hint), default_of(schema, entry), str(allowed) if allowed else "", text
    )


def default_of(schema: type, entry: Field[Any]) -> str:
    """Return the default as YAML would have it."""
    if schema is ModelConfig and entry.name in {field.name for field in fields(DiTConfig)}:
        return "the preset's"
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    # JSON is YAML; only texts read better without quotation marks
    text = value if isinstance(value, str) and value else json.dumps(value)
    return f"`{text}`"


def type_name(hint: Any) -> str:
    """Return a type in words that a YAML's author knows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if each is type(None) else type_name(each) for each in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}s"
    if origin is tuple:
        return f"list of {len(arguments)} {type_name(arguments[0])}s"
    if origin is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if is_dataclass(hint) and isinstance(hint, type):
        return hint.__name__.removesuffix("Config").lower()
    return {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}[hint]


def field_docstrings(schema: type) -> dict[str, str]:
    """Return the docstring below each field, of the class and of those it inherits from."""
    texts: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        if not is_dataclass(each):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for entry, after in zip(tree.body, tree.body[1:], strict=False):
            value = after.value if isinstance(after, ast.Expr) else None
            if isinstance(entry, ast.AnnAssign) and isinstance(value, ast.Constant):
                texts[ast.unparse(entry.target)] = one_line(str(value.value))
    return texts


def first_paragraph(schema: type) -> str:
    """Return the first paragraph of a class's docstring."""
    return one_line((inspect.getdoc(schema) or "").split("\n\n")[0])


def one_line(text: str) -> str:
    """Return a docstring as one line that a table can have."""
    return " ".join(text.split()).replace("|", "\\|")


def render(schema: type) -> str:
    """Return all sections of a dataclass as Markdown."""
    parts = []
    for section in sections(schema):
        title = f"`{section.path}`" if section.path else "Top level"
        rows = [f"| `{row.key}` | {' | '.join(row[1:])} |" for row in section.settings]
        table = "\n".join([HEADER, *rows]) if rows else ""
        parts.append("\n\n".join(filter(None, [f"## {title}", section.meaning, table])))
    return "\n\n".join(parts)


def preset_table() -> str:
    """Return the sizes of the presets as a table."""
    names = [field.name for field in fields(DiTConfig)]
    lines = [f"| key | {' | '.join(f'`{name}`' for name in PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    for name in names:
        values = (f"`{getattr(preset, name)}`" for preset in PRESETS.values())
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    return "\n".join(
        ["## Presets", "", "`model.preset` sets these, and other keys replace them.", "", *lines]
    )


def filter_text() -> str:
    """Return what the module of the filters says about them."""
    text = inspect.getdoc(filters) or ""
    before, example, after = text.split("\n\n")
    return (
        f"## Filters\n\n{one_line(before)}\n\n```yaml\n{textwrap.dedent(example)}\n```\n\n{one_line(after)}"
    )


def pages() -> dict[str, str]:
    """Return the generated pages by their names."""
    return {
        "stages.md": f"{STAGES}\n{render(StageConfig)}\n\n{preset_table()}\n",
        "datasets.md": f"{DATASETS}\n{render(DatasetConfig)}\n\n{filter_text()}\n",
    }


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
