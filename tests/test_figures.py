"""The form of the code: air and comments, no nested one-liners, no long lines, as `benchmarks.house` counts.

`python -m benchmarks.house . OTHER_CHECKOUT` prints the figures side by side.
"""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks import house_areas
from benchmarks.house import PACKAGES, count_file, count_rooms, figures, imports_between

ROOT = Path(__file__).parent.parent

AT_LEAST = {
    "comment lines %": 3.0,
    "blank lines inside functions %": 7.0,
    "annotated functions %": 99.0,
}
AT_MOST = {
    "comprehensions per 1,000 lines": 30.0,
    "nested comprehensions per 1,000 lines": 1.0,
    "lines over 110 characters %": 0.3,
    "function length, max": 100,
}


@cache
def measured():
    return figures(ROOT)


@pytest.mark.parametrize("name", AT_LEAST)
def test_figure_is_high_enough(name):
    value = measured()[name]
    assert value >= AT_LEAST[name], f"{name} is {value}, the limit is {AT_LEAST[name]}"


@pytest.mark.parametrize("name", AT_MOST)
def test_figure_is_low_enough(name):
    value = measured()[name]
    assert value <= AT_MOST[name], f"{name} is {value}, the limit is {AT_MOST[name]}"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_comprehension_is_inside_another(package):
    nested = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, COMPREHENSIONS):
                continue
            if sum(isinstance(each, COMPREHENSIONS) for each in ast.walk(node)) > 1:
                nested.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not nested


SAMPLE = '''"""A module.

It has five docstring lines.
"""

# A comment.
NAMES = [letter for letter in "abc"]  # no line of its own


def typed(names: list[str]) -> list[list[str]]:
    """A function.

    One blank line inside.
    """
    if not names:
        raise ValueError

    # Another comment.
    return [[letter for letter in name] for name in names]


def untyped(*names):
    text = """a string with

    a blank line"""
    assert names, text
    return [letter for name in names for letter in name]
'''


def test_counts_of_a_small_file(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE + f"LONG = {'1' * 104}\n")
    counts = count_file(path)
    assert (counts.files, counts.lines) == (1, SAMPLE.count("\n") + 1)
    assert (counts.comment_lines, counts.docstring_lines, counts.long_lines) == (2, 8, 1)
    assert (counts.comprehensions, counts.nested_comprehensions) == (4, 2)
    assert (counts.raises, counts.asserts) == (1, 1)
    assert sorted(counts.function_lengths) == [6, 10]
    assert counts.annotated == 1
    assert (counts.function_lines, counts.function_blanks, counts.code_blanks) == (16, 3, 1)


def test_the_amount_of_code_does_not_depend_on_its_format(tmp_path):
    short, airy = tmp_path / "short.py", tmp_path / "airy.py"
    short.write_text("def f(a: int) -> str:\n    return g(a, 'one two')\n")
    airy.write_text(
        'def f(\n    a: int,\n) -> str:\n    """Add."""\n\n    # Why.\n    return (g(a, "one " "two",))\n'
    )
    assert count_file(short).nodes == count_file(airy).nodes > 0


@pytest.fixture
def checkout(tmp_path):
    """Two files at the top of a package and a folder of two, with four imports between them."""
    files = {
        "model/__init__.py": "",
        "model/net.py": "from model.parts.block import Block\nfrom model.parts import norm\n",
        "model/size.py": "def size():\n    import model.net\n    return model.net\n",
        "model/parts/__init__.py": "",
        "model/parts/block.py": "import json\nfrom model.parts.norm import Norm\n",
        "model/parts/norm.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_imports_and_rooms(checkout):
    assert imports_between(checkout) == {
        ("model.net", "model.parts.block"),
        ("model.net", "model.parts.norm"),
        ("model.size", "model.net"),
        ("model.parts.block", "model.parts.norm"),
    }
    assert count_rooms(checkout, "model", imports_between(checkout)) == {
        "files": 4,
        "imports": 4,
        "rooms": 3,
        "arrows": 2,
    }


def test_command_prints_a_column_per_checkout_and_json_last(checkout):
    command = [sys.executable, "-m", "benchmarks.house", str(checkout), str(checkout.parent)]
    printed = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert printed[0] == f"| | {checkout} | {checkout.parent} |"
    assert json.loads(printed[-1])["figures"][str(checkout)]["model: files / imports between them"] == "4 / 4"


def test_features_before_and_after_name_files_that_exist():
    patterns = [
        *(area.after for area in house_areas.FIRST_WAVE.values()),
        *house_areas.SINCE.values(),
    ]
    named = " ".join(patterns).split()
    assert len(set(named)) == len(named)
    missing = [pattern for pattern in named if not list(ROOT.glob(f"{pattern}.py"))]
    assert not missing, f"benchmarks/house_areas.py: these moved: {missing}"


def test_features_of_two_checkouts(checkout):
    (checkout / "model/presets.py").write_text("ONE = 1\n")
    *features, whole = house_areas.compare(checkout, checkout)
    assert sum(row["lines after"] for row in features) == whole["lines before"] == 1
    assert whole["change"] == "+0 %"
    since = house_areas.built_since(checkout)
    assert [row["files"] for row in since] == [0] * len(house_areas.SINCE) + [6]
