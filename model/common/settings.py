"""Reading a YAML into dataclasses, with errors that name the key and the nearest right one."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.common.errors import UserError, first_line

MAX_BYTES = 1 << 20
"""Largest YAML that is read."""
MAX_DEPTH = 32
"""Most lists and mappings inside one another. Parsers that recurse crash on thousands of them."""
MAX_SEED = 2**62
"""Largest seed: sums of seeds and numbers of samples then still fit into 64 bits."""
_RANGE = "range"


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, both ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """True if the number is in the range, which NaN never is."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"{low} to {high}"


def within(low: float, high: float) -> dict[str, Range]:
    """Return the metadata of a dataclass's field whose numbers have to be in a range."""
    return {_RANGE: Range(low, high)}


def allowed_range(entry: Field[Any]) -> Range | None:
    """Return the range that the numbers of a dataclass's field have to be in; None = any."""
    return entry.metadata.get(_RANGE)


def bounded(default: Any, low: float, high: float) -> Any:
    """Return a field with a default whose numbers have to be in a range."""
    return field(default=default, metadata=within(low, high))


def check_name(key: str, name: str) -> None:
    """Check that a name can be that of a folder, and of no other folder than its own.

    Args:
        key: the setting, for the message.
        name: its value.

    Raises:
        UserError: if it cannot.
    """
    if not re.fullmatch(r"[\w.-]{1,100}", name) or not name.strip("."):
        raise UserError(
            f"{key}={name[:120]!r}: use letters, digits, `.`, `_` and `-` only, at most 100, since it names "
            "a folder"
        )


def load_yaml(path: Path) -> Any:
    """Read a YAML file of settings, with nothing in it resolved or checked against a schema.

    Raises:
        UserError: if the file cannot be read, is not YAML, or is too large or nested too deeply.
    """
    try:
        with path.open("rb") as file:
            # Not the whole file: it may be a device that never ends.
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes, so this is no file of settings")
        text = content.decode()
        _check_depth(text, str(path))
        return OmegaConf.load(io.StringIO(text))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {first_line(error)}") from error


def read_settings(
    schema: type, path: Path, overrides: list[str], defaults: Callable[[Any], Any] | None = None
) -> Any:
    """Read a YAML into a dataclass and apply `key=value` overrides; `key=` empties a text.

    Args:
        schema: the dataclass.
        path: of the YAML.
        overrides: `key=value` each.
        defaults: given the settings of YAML and overrides, returns the instance of `schema` that they are set
            over; it may change the settings. None = the defaults of the fields.

    Raises:
        UserError: if the file is missing or is not YAML, a key is unknown, or a value is missing, has the
            wrong type or is out of range; the message names the key and the nearest right one.
    """
    loaded = load_yaml(path)
    with _errors_as_one_line(str(path)):
        empty = OmegaConf.structured(schema)
        written = _with_values(overrides, empty)
        inside, outside = _split_lists(written, OmegaConf.to_container(loaded), OmegaConf.to_container(empty))
        # Not merged with the schema yet, so that `defaults` sees only what the user wrote.
        given = OmegaConf.merge(loaded, OmegaConf.from_dotlist(outside))
        for override in inside:
            _set_in_list(given, override)
        _refuse_functions(OmegaConf.to_container(given), str(path))

        base = empty if defaults is None else OmegaConf.structured(defaults(given))
        return _merge(base, given, str(path))


def settings_from(schema: type, values: Mapping[str, Any], what: str) -> Any:
    """Return the dataclass that a file's mapping describes, with types and ranges checked.

    Args:
        schema: the dataclass.
        values: by field; the others take their default.
        what: names the mapping in an error.

    Raises:
        UserError: if a key is unknown, or a value has the wrong type or is out of range.
    """
    with _errors_as_one_line(what):
        given = OmegaConf.create(dict(values))
        _refuse_functions(OmegaConf.to_container(given), what)
        return _merge(OmegaConf.structured(schema), given, what)


def _merge(base: Any, given: Any, what: str) -> Any:
    # The schema is first in the merge, because OmegaConf checks keys and types against the first config.
    merged = OmegaConf.merge(base, given)
    # Before the dataclasses are made, since they compute with the numbers.
    for key, value, allowed in _out_of_range(merged, "", None):
        raise UserError(f"{what}: {key}={value}: set a number from {allowed}")
    return OmegaConf.to_object(merged)


@contextmanager
def _errors_as_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except yaml.YAMLError as error:
        raise UserError(f"{what}: not YAML: {first_line(error)}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        line = first_line(error)
        # OmegaConf names neither the key nor the way out.
        if "incompatible container" in line:
            line = f"{line}: a mapping in place of a list or the reverse: set a list as a whole, 'NAME=[...]'"
        raise UserError(f"{what}: {f'{key}: ' if key else ''}{line}") from error


def _with_values(overrides: list[str], defaults: DictConfig) -> list[str]:
    """Return the overrides with `key=` written as an empty text if the value is a text; else it is None."""
    written = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"{override}: no setting: write key=value")
        if len(re.findall(r"[.[]", key)) > MAX_DEPTH:
            raise UserError(f"{key[:60]}...: more than {MAX_DEPTH} names inside one another")
        _check_depth(value, key)
        empties = not value and isinstance(OmegaConf.select(defaults, key), str)
        written.append(f"{key}=''" if empties else override)
    return written


class _Step(NamedTuple):
    """The first list that a key leads into."""

    name: str
    """Key of the list."""
    entries: list[Any]
    entry: str
    """Name of the entry, which should be a number."""


def _first_list(node: Any, key: str) -> _Step | None:
    """Return the first list that a key such as `sources.0.path` leads into; None if there is none."""
    names = [name for name in re.split(r"[.\[\]]", key) if name]
    for number, name in enumerate(names):
        if isinstance(node, list):
            return _Step(".".join(names[:number]), node, name)
        node = node.get(name) if isinstance(node, Mapping) else None
    return None


def _split_lists(overrides: list[str], loaded: Any, defaults: Any) -> tuple[list[str], list[str]]:
    """Split overrides into those of entries of the file's lists, and all others.

    Raises:
        UserError: if a key leads into a list that the file does not have.
    """
    inside, outside = [], []
    # A list that another override sets is complete once that one is.
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        key = override.partition("=")[0]
        step = _first_list(loaded, key)
        default = _first_list(defaults, key)
        if step is None and default is not None and default.name not in given:
            raise UserError(
                f"{key}: the file has no list `{default.name}`: write it there, or set it as a whole: "
                f"'{default.name}=[...]'"
            )
        into_list = step is not None or (default is not None and default.name in given)
        (inside if into_list else outside).append(override)
    return inside, outside


def _set_in_list(given: Any, override: str) -> None:
    """Set one key of a list's entry.

    Raises:
        UserError: if the list has no such entry.
    """
    key, _, value = override.partition("=")
    step = _first_list(OmegaConf.to_container(given), key)
    if step is None or not step.entry.isdecimal() or int(step.entry) >= len(step.entries):
        name, count = (step.name, len(step.entries)) if step else (key, 0)
        raise UserError(
            f"{key}: no such entry: `{name}` has {count}, counted from 0: name one of them, or set the list "
            f"as a whole: '{name}=[...]'"
        )
    # Read like all overrides, and with references left to be resolved later.
    content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    is_text = isinstance(OmegaConf.select(given, key), str)
    OmegaConf.update(given, key, "" if is_text and not value else content["value"])


def _check_depth(text: str, what: str) -> None:
    """Refuse YAML that is nested too deeply. Its events are read without recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{what}: more than {MAX_DEPTH} lists and mappings inside one another")


def _refuse_functions(node: Any, what: str) -> None:
    """Refuse `${oc.env:NAME}` and other functions; `${other.key}` stays allowed.

    Settings are printed, and kept in files that others read, and a variable may hold a secret.
    """
    if isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_functions(value, f"{what}: {key}")
    elif isinstance(node, str):
        text, rest = "", node
        # Innermost first, since a key may itself hold a reference.
        while text != rest:
            text, rest = rest, re.sub(r"(?<!\\)\$\{[^${}:]*\}", "", rest)
        if re.search(r"(?<!\\)\$\{.*:", rest, re.DOTALL):
            raise UserError(
                f"{what}: {node} is not evaluated, since settings are stored where others read them: write "
                "the value, or let the shell fill it in (key=$NAME on the command line)"
            )


def _out_of_range(node: Any, path: str, allowed: Range | None) -> Iterator[tuple[str, float, Range]]:
    """Yield the key, value and range of each number that is out of its range."""
    if isinstance(node, DictConfig):
        schema: Any = OmegaConf.get_type(node)
        known = fields(schema) if is_dataclass(schema) else ()
        ranges = {each.name: allowed_range(each) for each in known}
        for key in node:
            inner = f"{path}.{key}" if path else str(key)
            # In a mapping of numbers, all of them have the range of the mapping.
            yield from _out_of_range(node[key], inner, ranges.get(str(key), allowed))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _out_of_range(value, f"{path}[{index}]", allowed)
    elif isinstance(node, int | float) and not isinstance(node, bool) and allowed and node not in allowed:
        yield path, node, allowed
