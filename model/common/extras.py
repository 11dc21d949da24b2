"""Packages that only some commands need: the extras of pyproject.toml."""

from importlib.util import find_spec

from model.common.errors import UserError


def require(extra: str, module: str) -> None:
    """Check that a package of an extra is installed.

    Args:
        extra: name of the extra.
        module: a module of the package.

    Raises:
        UserError: if it is not installed.
    """
    if find_spec(module) is None:
        raise UserError(
            f"package {module} is missing: install the extra, pip install -c constraints.txt -e '.[{extra}]'"
        )
