"""Named filters, composed in a dataset's YAML. Each looks at one row and gives a reason for leaving something out.

    filters:
      - {name: min_side, value: 256}                      # shorter side in pixels
      - {name: max_aspect, value: 3}                      # long side / short side
      - {name: min_value, column: aesthetic, value: 4.7}  # also max_value; a missing value is a reason too
      - {name: one_of, column: lang, value: [en, zh]}
      - {name: expression, value: "punsafe < 0.5 and watermark is not None"}
      - {name: caption_url}                               # captions that contain a URL
      - {name: caption_file_name}                         # captions that are file names
      - {name: caption_tags}                              # captions that are tag lists
      - {name: caption_min_length, value: 3}              # letters; also caption_max_length
      - {name: caption_without, value: [shutterstock]}    # words or phrases, in any case

Filters whose name starts with `caption_` leave out single captions; a row goes when its last caption goes. The others leave out
the row. The first reason counts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import FilterConfig
from data_prep.plan.captions import Caption
from data_prep.plan.expressions import ColumnExpression, finite
from model.common.errors import UserError

URL = re.compile(r"https?://|\bwww\.[a-z0-9-]+\.|\b[a-z0-9-]+\.(?:com|net|org|io|co\.uk|ru|cn|de)\b(?:/|$|\s)", re.IGNORECASE)
FILE_NAME = re.compile(
    r"\S*\.(?:jpe?g|png|gif|webp|avif|bmp|tiff?|heic|raw|cr2|nef|svg|pdf)"
    r"|(?:IMG|DSC|DSCN|DSCF|PXL|MVI|PICT|Screenshot)[ _-]?\d[\w-]*",
    re.IGNORECASE,
)
TAG_MAX_WORDS = 3
TAG_MIN_COUNT = 4
SENTENCE = re.compile(r"[.!?](?:\s|$)")

RowTest = Callable[[dict[str, Any]], str]
CaptionTest = Callable[[str], str]


@dataclass
class Row:
    """What filters see of a row; they leave their reasons in it."""

    record: dict[str, Any]
    captions: list[Caption]
    height: int
    width: int
    reason: str = ""
    refused: list[str] = field(default_factory=list)
    """A reason for each caption left out."""


class Filters:
    """The filters of a dataset, in the order of its YAML.

    Raises:
        UserError: an unknown name, or arguments that do not fit.
    """

    def __init__(self, configs: Sequence[FilterConfig]) -> None:
        self._steps: list[Callable[[list[Row]], None]] = []
        self.columns: list[str] = []
        for number, config in enumerate(configs):
            if config.name == "expression":
                expression = ColumnExpression(_value(config, str))
                self._steps.append(_expression_step(expression))
                self.columns += expression.columns
                continue
            if config.name not in BUILDERS:
                names = ", ".join(["expression", *BUILDERS])
                raise UserError(f"filters[{number}].name={config.name!r}: no such filter; there are {names}")
            test = BUILDERS[config.name](config)
            if config.column is not None:
                self.columns.append(config.column)
            self._steps.append(_caption_step(test) if config.name.startswith("caption_") else _row_step(test))

    def apply(self, rows: Sequence[Row]) -> None:
        """Set the reasons of rows, and take out captions, in place."""
        for step in self._steps:
            left = [row for row in rows if not row.reason]
            if left:
                step(left)


def _row_step(test: RowTest) -> Callable[[list[Row]], None]:
    def step(rows: list[Row]) -> None:
        for row in rows:
            row.reason = test({**row.record, "height": row.height, "width": row.width})

    return step


def _caption_step(test: CaptionTest) -> Callable[[list[Row]], None]:
    def step(rows: list[Row]) -> None:
        for row in rows:
            kept = []
            for caption in row.captions:
                reason = test(caption.text)
                if reason:
                    row.refused.append(reason)
                else:
                    kept.append(caption)
            row.captions = kept
            if not kept:
                row.reason = row.refused[0]

    return step


def _expression_step(expression: ColumnExpression) -> Callable[[list[Row]], None]:
    def step(rows: list[Row]) -> None:
        records = [{**row.record, "height": row.height, "width": row.width} for row in rows]
        for row, keep in zip(rows, expression.evaluate(records), strict=True):
            if not keep:
                row.reason = f"expression {'without a value' if keep is None else 'false'}: {expression.text}"

    return step


def _min_side(config: FilterConfig) -> RowTest:
    least = _number(config)
    return lambda row: f"min_side: below {least:g}" if min(row["height"], row["width"]) < least else ""


def _max_aspect(config: FilterConfig) -> RowTest:
    most = _number(config)
    return lambda row: (
        f"max_aspect: above {most:g}" if max(row["height"], row["width"]) > most * min(row["height"], row["width"]) else ""
    )


def _min_value(config: FilterConfig) -> RowTest:
    return _bounded(config, lambda value, bound: value < bound, "below")


def _max_value(config: FilterConfig) -> RowTest:
    return _bounded(config, lambda value, bound: value > bound, "above")


def _bounded(config: FilterConfig, out: Callable[[float, float], bool], word: str) -> RowTest:
    bound, name = _number(config), _column(config)

    def test(row: dict[str, Any]) -> str:
        value = finite(row.get(name))
        if value is None:
            return f"{config.name}: no {name}"
        return f"{config.name}: {name} {word} {bound:g}" if out(value, bound) else ""

    return test


def _one_of(config: FilterConfig) -> RowTest:
    allowed, name = _value(config, list), _column(config)
    return lambda row: "" if row.get(name) in allowed else f"one_of: {name}"


def _caption_url(config: FilterConfig) -> CaptionTest:
    return lambda text: "caption_url" if URL.search(text) else ""


def _caption_file_name(config: FilterConfig) -> CaptionTest:
    return lambda text: "caption_file_name" if FILE_NAME.fullmatch(text) else ""


def _caption_tags(config: FilterConfig) -> CaptionTest:
    """A list of four or more short items, parted by commas, semicolons, bars or hashes, and no sentence."""

    def test(text: str) -> str:
        items = [item.strip() for item in re.split(r"[,;|#]", text) if item.strip()]
        short = sum(len(item.split()) <= TAG_MAX_WORDS for item in items)
        return "caption_tags" if len(items) >= TAG_MIN_COUNT and short >= 0.8 * len(items) and not SENTENCE.search(text) else ""

    return test


def _caption_min_length(config: FilterConfig) -> CaptionTest:
    least = _number(config)
    return lambda text: f"caption_min_length: below {least:g}" if len(text) < least else ""


def _caption_max_length(config: FilterConfig) -> CaptionTest:
    most = _number(config)
    return lambda text: f"caption_max_length: above {most:g}" if len(text) > most else ""


def _caption_without(config: FilterConfig) -> CaptionTest:
    phrases = [str(phrase).casefold() for phrase in _value(config, list)]
    return lambda text: next((f"caption_without: {phrase}" for phrase in phrases if phrase in text.casefold()), "")


def _value(config: FilterConfig, kind: type) -> Any:
    if not isinstance(config.value, kind):
        raise UserError(f"filter {config.name}: value={config.value!r} is not a {kind.__name__}: set one")
    return config.value


def _number(config: FilterConfig) -> float:
    if isinstance(config.value, bool) or not isinstance(config.value, int | float):
        raise UserError(f"filter {config.name}: value={config.value!r} is not a number: set one")
    return config.value


def _column(config: FilterConfig) -> str:
    if not config.column:
        raise UserError(f"filter {config.name}: set `column`, the column that it looks at")
    return config.column


BUILDERS: dict[str, Callable[[FilterConfig], Callable[[Any], str]]] = {
    "min_side": _min_side,
    "max_aspect": _max_aspect,
    "min_value": _min_value,
    "max_value": _max_value,
    "one_of": _one_of,
    "caption_url": _caption_url,
    "caption_file_name": _caption_file_name,
    "caption_tags": _caption_tags,
    "caption_min_length": _caption_min_length,
    "caption_max_length": _caption_max_length,
    "caption_without": _caption_without,
}
