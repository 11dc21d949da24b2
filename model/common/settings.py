"""Reading a YAML into dataclasses, with errors that name the key and the nearest right one."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from model.common.errors import UserError, first_line


def read_settings(schema: type, path: Path, overrides: list[str]) -> Any:
    """Read a YAML into `schema` and apply `key=value` overrides; `key=` empties a text.

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown, or a value is missing or has the wrong type; the
            message names the key and the nearest right one.
    """
    try:
        defaults = OmegaConf.structured(schema)
        merged = OmegaConf.merge(
            defaults, OmegaConf.load(path), OmegaConf.from_dotlist(_with_values(overrides, defaults))
        )
        return OmegaConf.to_object(merged)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{first_line(error)}") from error


def _with_values(overrides: list[str], defaults: DictConfig) -> list[str]:
    """The overrides with `key=` spelt out as empty text where the key's value is text; elsewhere it means None."""
    spelt = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"{override}: no setting: write key=value")
        empties = not value and isinstance(OmegaConf.select(defaults, key), str)
        spelt.append(f"{key}=''" if empties else override)
    return spelt
