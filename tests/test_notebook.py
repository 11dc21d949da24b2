"""The notebook is stored without outputs, and runs from start to end on a tiny export."""

import json
from pathlib import Path

import pytest

from pipeline.export import build_pipeline
from tests.helpers.tiny_sampler import sampler_with_families

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "demo.ipynb"
PATCH = """
from pipeline import diffusers_pipeline
from tests.helpers.tiny_sampler import WIDTHS, LetterLLM

diffusers_pipeline.load_llm = lambda family, device: LetterLLM(WIDTHS[family.name])
"""
"""The tiny export's LLMs only count letters."""
SHOWN = ("image", "seeds", "attention", "steps", "gates")
"""Cells that show an image."""


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert {cell["id"] for cell in code} >= set(SHOWN)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len(NOTEBOOK.read_bytes()) < 20_000


def test_the_notebook_runs_on_an_export(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
    build_pipeline(sampler_with_families()).save_pretrained(tmp_path / "export")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (settings,) = (cell for cell in notebook.cells if cell.id == "settings")
    assert settings.source.startswith('EXPORT = "demo_export"\n')
    settings.source = settings.source.replace("demo_export", str(tmp_path / "export"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PATCH))
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": ROOT}}).execute()

    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    for name in SHOWN:
        pngs = [output for output in cells[name].outputs if "image/png" in output.get("data", {})]
        assert len(pngs) == 1, name
