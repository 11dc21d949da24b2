"""Only the files that `docs/architecture.md` lists for another implementation name a built-in one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("model", "data_prep", "pipeline")

# A built-in implementation of each kind: the module that has it, and what names it there.
IMPLEMENTATIONS = {
    "block type": ("model/dit_block.py", ("DiTBlock",)),
    "objective": ("pipeline/diffusion/ddpm.py", ("DDPM",)),
    "encoder": ("model/encoders/encoder_kinds.py", ("T5Encoder",)),
    "optimizer": ("pipeline/engine/muon.py", ("MuonSettings", "Muon")),
    "condition": ("model/conditions.py", ("GuidanceCondition",)),
    "latent space": ("model/encoders/pixels.py", ("Pixels",)),
}


def named_files() -> dict[str, tuple[str, list[str]]]:
    """Return of each row of the table its number of files after the change, and the files that it names."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("## Extending it") :]
    rows = {}
    for line in re.findall(r"^\| .* \|$", table, re.MULTILINE):
        what, _before, after, files, _test = (cell.strip() for cell in line.strip("|").split("|"))
        rows[what] = after, re.findall(r"`([\w/]+\.py)`", files)
    return rows


def files_that_name(module: str, names: tuple[str, ...]) -> set[str]:
    """Return the files of the packages that define or import a module's names, or the module itself, also by
    its name in a list of modules."""
    dotted = module.removesuffix(".py").replace("/", ".")
    package, _, last = dotted.rpartition(".")
    found = {module}
    for path in (file for folder in PACKAGES for file in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        if f'"{dotted}"' in text:
            found.add(str(path.relative_to(ROOT)))
        # Most files need not be parsed.
        for node in ast.walk(ast.parse(text)) if last in text else ():
            if not isinstance(node, ast.ImportFrom):
                continue
            imported = {alias.name for alias in node.names}
            by_name = node.module == dotted and imported & set(names)
            if by_name or (node.module == package and last in imported):
                found.add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("what", IMPLEMENTATIONS)
def test_no_other_file_names_an_implementation(what):
    module, names = IMPLEMENTATIONS[what]
    after, files = named_files()[what]
    assert all(name in (ROOT / module).read_text() for name in names)
    # The new file stands in the table as what it is, such as `the block`, and not by a name.
    expected = {module, *files}
    assert files_that_name(module, names) == expected
    assert int(after.split(" to ")[-1]) == len(expected)
