"""Reading a YAML into dataclasses, with errors that name the key and the nearest right one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from model.common.errors import UserError, first_line


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
        UserError: if the file is missing or is not YAML, a key is unknown, or a value is missing or has the
            wrong type; the message names the key and the nearest right one.
    """
    try:
        empty = OmegaConf.structured(schema)
        # Not merged with the schema yet, so that `defaults` sees only what the user wrote.
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(_with_values(overrides, empty)))
        # The schema is first in the merge, because OmegaConf checks keys and types against the first config.
        base = empty if defaults is None else OmegaConf.structured(defaults(given))
        return OmegaConf.to_object(OmegaConf.merge(base, given))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{first_line(error)}") from error


def _with_values(overrides: list[str], defaults: DictConfig) -> list[str]:
    """Return the overrides with `key=` written as an empty text if the value is a text; else it is None."""
    written = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"{override}: no setting: write key=value")
        empties = not value and isinstance(OmegaConf.select(defaults, key), str)
        written.append(f"{key}=''" if empties else override)
    return written
