"""The notebooks as they are committed: without outputs, and without what changes whenever one is opened."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_is_a_tour() -> None:
    assert "tour" in {path.stem for path in NOTEBOOKS}


@every_notebook
def test_is_valid_and_holds_nothing_of_a_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # Of any version.


@every_notebook
def test_each_cell_has_a_name_of_its_own(path: Path) -> None:
    names = [cell.id for cell in nbformat.read(path, as_version=4).cells]
    assert len(names) == len(set(names))
    assert all(name.replace("-", "").isalpha() for name in names)
