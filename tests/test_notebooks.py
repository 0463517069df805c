"""The notebooks, executed from another folder with few steps; a cell that fails fails the test."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
MAX_BYTES = 300_000


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[Any]:
    """The code cells of a notebook after they ran in a folder, offline."""
    monkeypatch.setenv("NOTEBOOK_STEPS", str(steps))
    monkeypatch.setenv("GUIDED_DIFFUSERS_CHECKOUT", str(EXAMPLES.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    notebook = nbformat.read(EXAMPLES / name, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cells: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def printed(cells: list[Any]) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pictures(executed("quickstart.ipynb", tmp_path, monkeypatch, 3)) == 5


def test_your_data_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = executed("your_data.ipynb", tmp_path, monkeypatch, 4)
    assert pictures(cells) == 2
    text = printed(cells)
    assert "Verdict:" in text
    assert re.findall(r"scale (\d): accuracy \d+%, Frechet distance [\d.]+", text) == ["0", "3"]
    assert (tmp_path / "out/your_data/model/classifier").is_dir()


def committed(name: str) -> list[dict[str, Any]]:
    path = EXAMPLES / name
    assert path.stat().st_size < MAX_BYTES
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_quickstart_is_committed_with_its_pictures() -> None:
    """Each cell was run, in order, without an error or a path of the machine."""
    cells = committed("quickstart.ipynb")
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert pictures([nbformat.from_dict(cell) for cell in cells]) == 5
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"display_data", "execute_result", "stream"}
    assert not re.search(r"/(home|root|tmp|work|opt)/", json.dumps(outputs))


def test_your_data_is_committed_without_results() -> None:
    """They would be of the machine that trained."""
    cells = committed("your_data.ipynb")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
