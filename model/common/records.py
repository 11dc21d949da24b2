"""The one way to read a record: JSON that this program wrote, and that may have been damaged since.

Size and depth are bounded. A schema, which is a dataclass or a TypedDict, says which fields there are, of
which type and in which range; a field that it does not name is an error. A sealed record also has the hash of
its content, so that a change which keeps all types is noticed too. Records without a seal, as earlier
versions wrote them, are still read.
"""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic_core
import xxhash
from pydantic import Field, TypeAdapter, ValidationError

from model.common.errors import UserError

MAX_RECORD_BYTES = 256 << 20
"""The largest records count the rows of each part or source file; a billion samples take a tenth of this."""
SEAL = "xxh64"
"""Field of a sealed record with the hash of all others."""

STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""Value of `__pydantic_config__` in a schema."""
OPEN: Any = {**STRICT, "extra": "allow"}
"""The same of a schema that names some of the fields only."""

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
NoHash = Annotated[str, Field(pattern="^$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
"""One name in a key: of a bucket or a family."""

Record = TypeVar("Record")

_ENCODERS: dict[bool, json.JSONEncoder] = {}
"""Encoders by `allow_nan`. `json.dumps` makes one per call, which takes as long as a small record."""
for _allow_nan in (False, True):
    _ENCODERS[_allow_nan] = json.JSONEncoder(
        sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=_allow_nan
    )


def canonical_json(record: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, so that equal records are equal bytes."""
    # NaN is not JSON, and readers in other languages would refuse the record.
    return _compact_json(record, allow_nan=False)


def seal(record: dict[str, Any], *, allow_nan: bool = False) -> bytes:
    """Return the canonical JSON of a record with the hash of its content."""
    # Through JSON first: keys that are numbers become text there, which has another order.
    record = json.loads(_compact_json(record, allow_nan))
    content = _compact_json(record, allow_nan)
    return _compact_json({**record, SEAL: xxhash.xxh64_hexdigest(content)}, allow_nan)


def _compact_json(record: Any, allow_nan: bool) -> bytes:
    return _ENCODERS[allow_nan].encode(record).encode()


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is longer than `MAX_RECORD_BYTES`, nested deeper than 200 levels, or not JSON.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"over {MAX_RECORD_BYTES:,} bytes")
    # Unlike the standard library's parser it has a limit of depth, and refuses halves of surrogate pairs,
    # which cannot be written again.
    return pydantic_core.from_json(data)


def parse_record(schema: type[Record], data: bytes) -> Record:
    """Return a record as an instance of its schema.

    Args:
        schema: a dataclass or a TypedDict, with `STRICT` or `OPEN` as its `__pydantic_config__`.
        data: the record's JSON.

    Raises:
        ValueError: if it is damaged: not JSON, of other fields, types or ranges, or not what was sealed.
    """
    if len(data) <= MAX_RECORD_BYTES and (content := _sealed_content(data)) is not None:
        return checked(schema, content)

    record = parse_json(data)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    digest = record.pop(SEAL, None)
    content = _compact_json(record, allow_nan=True)
    if digest is not None and digest != xxhash.xxh64_hexdigest(content):
        raise ValueError("its content does not match its hash")
    return checked(schema, content)


def _sealed_content(data: bytes) -> bytes | None:
    """Return the bytes that were sealed, if the seal is the last field and fits them as they are.

    Most records are like that, and need not be written again for their hash. None = the seal is elsewhere,
    there is none, or it does not fit these bytes, such as those of a record that an editor has indented.
    """
    end = b',"%s":"' % SEAL.encode()
    content = data[: -len(end) - 18] + b"}"
    return content if data.endswith(end + xxhash.xxh64_hexdigest(content).encode() + b'"}') else None


def checked(schema: Any, data: bytes) -> Any:
    """Return the value of a JSON text, checked against any type.

    Raises:
        ValueError: if it does not fit; the message names the first field that does not.
    """
    try:
        return _adapter(schema).validate_json(data)
    except ValidationError as error:
        # The value itself stays out of the message: it may be long, or hold control characters.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(name) for name in first["loc"] if str(name).isprintable())
        raise ValueError(f"{place[:100]}: {first['msg']}" if place else first["msg"]) from error


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    # Built once per schema: it takes about a millisecond.
    return TypeAdapter(schema)


def read_record(path: Path, schema: type[Record], way_out: str) -> Record:
    """Read a record from a file.

    Args:
        path: the file.
        schema: as in `parse_record`.
        way_out: what to do if the file is damaged, as the end of the error message.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it cannot be read, or is damaged.
    """
    try:
        return parse_record(schema, read_bounded(path))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}: {way_out}") from error


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a small file.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it cannot be read.
        ValueError: if it has more than `MAX_RECORD_BYTES`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: make it a file that can be read") from error
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"over {MAX_RECORD_BYTES:,} bytes")
    return data
