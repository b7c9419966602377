"""The notebook runs as it stands, offline, and is committed without outputs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"


def cells_of(notebook) -> dict:
    return {cell["id"]: cell for cell in notebook["cells"] if cell["cell_type"] == "code"}


def test_it_is_committed_without_outputs():
    cells = cells_of(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert len(cells) > 5
    for name, cell in cells.items():
        assert cell["outputs"] == [] and cell["execution_count"] is None, name


@pytest.mark.slow
def test_each_code_cell_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="it runs the notebook")
    pytest.importorskip("ipykernel", reason="the notebook's process")
    import nbformat  # nbclient brings it

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the suite also runs without an install
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook trains
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = {"kernel_name": "python3", "timeout": 600}
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, resources=resources, **options).execute()

    cells = cells_of(notebook)
    assert all(cell.execution_count and cell.outputs for cell in cells.values())
    assert any("image/png" in output.get("data", {}) for output in cells["curves"].outputs)
    text = "".join(output.text for output in cells["evaluate"].outputs)
    measured = re.findall(r"(\S+) +(-?[\d.]+) -> +(-?[\d.]+)", text)
    gained = {name: float(after) - float(before) for name, before, after in measured}
    assert gained["rewards/accuracies"] > 0 and gained["reward"] > 0
