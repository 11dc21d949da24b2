"""Reading a YAML into dataclasses, with errors that name the key and the nearest right one."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from model.errors import UserError


def read_settings(schema: type, path: Path, overrides: list[str]) -> Any:
    """Read a YAML into `schema` and apply `key=value` overrides.

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown, or a value has the wrong type; the message
            names the key and the nearest right one.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(merged)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
