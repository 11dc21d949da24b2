"""The documentation is true: paths and commands exist, and the figures are those of the code."""

import re
from pathlib import Path

import pytest

from docs.make_figures import CAPTION, Step, check_steps, figures, purpose, read_layers, without_shortcuts

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("model", "data_prep", "pipeline", "cluster", "benchmarks", "tests", "docs")


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    text = page.read_text()
    missing = []
    for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./*-]*", text):
        if not list(ROOT.glob(path.rstrip("./"))):
            missing.append(path)

    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http") and not (page.parent / target).exists():
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    for module in re.findall(r"-m ((?:model|data_prep|pipeline|benchmarks|docs)[\w.]*)", page.read_text()):
        if not module.endswith("NAME"):
            path = ROOT / module.rstrip(".").replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_page_of_commands_has_every_one():
    page = (ROOT / "docs" / "commands.md").read_text()
    for path in (ROOT / "pipeline").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text() and path.stem != "demo":
            assert f"pipeline.{path.stem}" in page, f"docs/commands.md does not mention {name(path)}"


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) < 1200


def claims():
    """The rows of the README's table of numbers, and the points below "What is different here"."""
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "](benchmarks/" in line]
    section = text.split("## What is different here")[1].split("\n## ")[0]
    return rows + section.strip().removeprefix("- ").split("\n- ")


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim[:40])
def test_a_claim_has_a_number_of_its_measurement(claim):
    pages = re.findall(r"\]\(((?:benchmarks/results|tests)/[\w/.]+)\)", claim)
    assert pages
    linked = "\n".join((ROOT / page).read_text() for page in pages)
    numbers = re.findall(r"\d[\d,.e-]*(?<=\d)", re.sub(r"\]\([^)]*\)|int8|bf16", "", claim))
    missing = [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", linked)]
    assert numbers
    assert not missing, f"{missing} are not in {pages}"


def test_the_map_has_every_sub_package_with_its_own_words():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for layer in read_layers(ROOT):
        folder = ROOT / layer.replace(".", "/")
        if folder.is_dir():
            assert f"| `{name(folder)}/` | {purpose(ROOT, layer)} |" in text, f"{name(folder)}/__init__.py"


def test_figures_are_those_of_the_code():
    for file, svg in figures(ROOT).items():
        drawn = (ROOT / "docs" / file).read_text()
        assert drawn == svg, f"docs/{file} is out of date: run `python -m docs.make_figures`"


def test_a_step_of_the_figure_must_exist():
    check_steps(ROOT, CAPTION)
    with pytest.raises(ValueError, match=r"model\.dit has no LIDiT\.fly"):
        check_steps(ROOT, [Step("Flight", "model.dit:LIDiT.fly", "")])
    with pytest.raises(ValueError, match=r"there is no model/flight\.py"):
        check_steps(ROOT, [Step("Flight", "model.flight:Wing", "")])


def test_an_import_that_follows_from_others_is_left_out():
    imports = {"top": {"middle", "base"}, "middle": {"base"}, "base": set()}
    assert without_shortcuts(imports) == [("top", "middle"), ("middle", "base")]


def test_every_decision_has_a_reason_and_evidence():
    for page in (ROOT / "docs" / "design").glob("*.md"):
        for section in page.read_text().split("\n## ")[1:]:
            heads = re.findall(r"^\*\*(\w+)\.\*\*", section, re.MULTILINE)
            assert heads == ["Decision", "Reason", "Evidence"], f"{name(page)}: {section.splitlines()[0]}"
            evidence = section.split("**Evidence.**")[1]
            assert re.search(r"`(tests|benchmarks)/", evidence), f"{name(page)}: {section.splitlines()[0]}"
