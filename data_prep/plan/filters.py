"""Named filters, composed in a dataset's YAML. A filter gives a reason to drop a row or a caption.

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

Filters whose name starts with `caption_` drop single captions; a row is dropped with its last caption. The
others drop the row. The first reason counts. Filters on columns of `annotations` come after the scan, in the
finish of the plan.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import DatasetConfig, FilterConfig
from data_prep.plan.captions import Caption
from data_prep.plan.expressions import ColumnExpression, finite
from model.common.errors import UserError

# Bare domains count only with a common ending: `park.The` is a missing space and no URL. A name is tried at
# its first letter only, so the time is linear in the caption; the second line asks for a `\b` anywhere in it.
URL = re.compile(
    r"https?://|\bwww\.[a-z0-9-]+\.|(?<![a-z0-9-])"
    r"(?:\b|(?=[a-z0-9]++-|-++[a-z0-9]))"
    r"[a-z0-9-]++\.(?:com|net|org|io|co\.uk|ru|cn|de)\b(?:/|$|\s)",
    re.IGNORECASE,
)
# For `fullmatch`: a caption that only mentions a file is kept. The second line has names that cameras give.
FILE_NAME = re.compile(
    r"\S*\.(?:jpe?g|png|gif|webp|avif|bmp|tiff?|heic|raw|cr2|nef|svg|pdf)"
    r"|(?:IMG|DSC|DSCN|DSCF|PXL|MVI|PICT|Screenshot)[ _-]?\d[\w-]*",
    re.IGNORECASE,
)
# Ordinary captions have commas too, but few short items between them.
MAX_TAG_WORDS = 3
MIN_TAGS = 4
MIN_TAG_SHARE = 0.8
SENTENCE = re.compile(r"[.!?](?:\s|$)")

OF_ANY_ROW = ("height", "width")
"""Columns that filters on annotations can read too."""

RowTest = Callable[[dict[str, Any]], str]
CaptionTest = Callable[[str], str]


@dataclass
class Row:
    """The part of a row that filters see, and their reasons."""

    record: dict[str, Any]
    captions: list[Caption]
    height: int
    width: int
    reason: str = ""
    refused: list[str] = field(default_factory=list)
    """A reason for each dropped caption."""

    @property
    def fields(self) -> dict[str, Any]:
        """The record with the image's size."""
        return {**self.record, "height": self.height, "width": self.width}


class Filters:
    """The filters of a dataset, in the order of its YAML; `columns` are the source columns that they read."""

    def __init__(self, configs: Sequence[FilterConfig]) -> None:
        """Build the filters.

        Raises:
            UserError: if a name is unknown, or arguments do not fit.
        """
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
            # Sources read only the columns that somebody asks for.
            if config.column is not None:
                self.columns.append(config.column)
            self._steps.append(_caption_step(test) if config.name.startswith("caption_") else _row_step(test))

    def apply(self, rows: Sequence[Row]) -> None:
        """Set the reasons of rows and remove captions, in place."""
        for step in self._steps:
            # The first reason counts, so later filters do not see a row that has one.
            remaining = [row for row in rows if not row.reason]
            if remaining:
                step(remaining)


def split_filters(config: DatasetConfig) -> tuple[list[FilterConfig], list[FilterConfig]]:
    """Return the filters on columns of the sources, and those on annotations.

    Raises:
        UserError: if one reads both, or an embedding.
    """
    annotated = {name for name, kind in config.annotation_columns.items() if kind != "embedding"}
    of_sources, of_annotations = [], []
    for number, settings in enumerate(config.filters):
        columns = {settings.column} if settings.column else set()
        if settings.name == "expression" and isinstance(settings.value, str):
            columns = set(ColumnExpression(settings.value).columns)
        if not columns & annotated:
            of_sources.append(settings)
            continue
        others = columns - annotated - set(OF_ANY_ROW)
        if others:
            raise UserError(
                f"filters[{number}]: reads {', '.join(sorted(columns & annotated))} of `annotations` and "
                f"{', '.join(sorted(others))} of the sources: write a filter for each"
            )
        of_annotations.append(settings)
    return of_sources, of_annotations


def _row_step(test: RowTest) -> Callable[[list[Row]], None]:
    def step(rows: list[Row]) -> None:
        for row in rows:
            row.reason = test(row.fields)

    return step


def _caption_step(test: CaptionTest) -> Callable[[list[Row]], None]:
    def step(rows: list[Row]) -> None:
        for row in rows:
            captions = []
            for caption in row.captions:
                reason = test(caption.text)
                if reason:
                    row.refused.append(reason)
                else:
                    captions.append(caption)
            row.captions = captions
            if not captions:
                row.reason = row.refused[0]

    return step


def _expression_step(expression: ColumnExpression) -> Callable[[list[Row]], None]:
    def step(rows: list[Row]) -> None:
        # All rows at once, because every evaluation is a query of its own.
        values = expression.evaluate([row.fields for row in rows])
        for row, value in zip(rows, values, strict=True):
            if not value:
                outcome = "without a value" if value is None else "false"
                row.reason = f"expression {outcome}: {expression.text}"

    return step


def _min_side(config: FilterConfig) -> RowTest:
    minimum = _number(config)
    return lambda row: f"min_side: below {minimum:g}" if min(row["height"], row["width"]) < minimum else ""


def _max_aspect(config: FilterConfig) -> RowTest:
    maximum = _number(config)

    def test(row: dict[str, Any]) -> str:
        short, long = sorted((row["height"], row["width"]))
        return f"max_aspect: above {maximum:g}" if long > maximum * short else ""

    return test


def _min_value(config: FilterConfig) -> RowTest:
    return _bounded(config, lambda value, bound: value < bound, "below")


def _max_value(config: FilterConfig) -> RowTest:
    return _bounded(config, lambda value, bound: value > bound, "above")


def _bounded(config: FilterConfig, is_outside: Callable[[float, float], bool], word: str) -> RowTest:
    bound = _number(config)
    name = _column(config)

    def test(row: dict[str, Any]) -> str:
        # A row without a value can pass no bound.
        value = finite(row.get(name))
        if value is None:
            return f"{config.name}: no {name}"
        return f"{config.name}: {name} {word} {bound:g}" if is_outside(value, bound) else ""

    return test


def _one_of(config: FilterConfig) -> RowTest:
    allowed, name = _value(config, list), _column(config)
    return lambda row: "" if row.get(name) in allowed else f"one_of: {name}"


def _caption_url(config: FilterConfig) -> CaptionTest:
    return lambda text: "caption_url" if URL.search(text) else ""


def _caption_file_name(config: FilterConfig) -> CaptionTest:
    return lambda text: "caption_file_name" if FILE_NAME.fullmatch(text) else ""


def _caption_tags(config: FilterConfig) -> CaptionTest:
    """Drop lists of four or more short items between commas, semicolons, bars or hashes, with no sentence."""

    def test(text: str) -> str:
        items = [item.strip() for item in re.split(r"[,;|#]", text) if item.strip()]
        tags = sum(len(item.split()) <= MAX_TAG_WORDS for item in items)
        is_list = len(items) >= MIN_TAGS and tags >= MIN_TAG_SHARE * len(items)
        return "caption_tags" if is_list and not SENTENCE.search(text) else ""

    return test


def _caption_min_length(config: FilterConfig) -> CaptionTest:
    minimum = _number(config)
    return lambda text: f"caption_min_length: below {minimum:g}" if len(text) < minimum else ""


def _caption_max_length(config: FilterConfig) -> CaptionTest:
    maximum = _number(config)
    return lambda text: f"caption_max_length: above {maximum:g}" if len(text) > maximum else ""


def _caption_without(config: FilterConfig) -> CaptionTest:
    phrases = [str(phrase).casefold() for phrase in _value(config, list)]

    def test(text: str) -> str:
        # `lower` would leave letters such as ß as they are.
        text = text.casefold()
        return next((f"caption_without: {phrase}" for phrase in phrases if phrase in text), "")

    return test


def _value(config: FilterConfig, kind: type) -> Any:
    if not isinstance(config.value, kind):
        raise UserError(f"filter {config.name}: value={config.value!r} is not a {kind.__name__}: set one")
    return config.value


def _number(config: FilterConfig) -> float:
    # `value: true` in YAML is a bool, which Python counts as an int.
    if isinstance(config.value, bool) or not isinstance(config.value, int | float):
        raise UserError(f"filter {config.name}: value={config.value!r} is not a number: set one")
    return config.value


def _column(config: FilterConfig) -> str:
    if not config.column:
        raise UserError(f"filter {config.name}: set `column`, the column that it reads")
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
