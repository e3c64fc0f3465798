"""The notebook, cell by cell, smaller: only its settings are others."""

import ast
import json
import sys
from types import ModuleType

import pytest
from conftest import POCKET, ROOT


SMALL = {"max_steps": 2, "batch_size": 2, "max_completion_length": 48, "num_held_out": 4}


@pytest.fixture
def cells():
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_runs_on_the_pocket_world(cells, tmp_path, monkeypatch, capsys):
    # Jupyter, which shows the picture, is none of our requirements.
    shown, jupyter = [], ModuleType("IPython.display")
    jupyter.Image = lambda filename: shown.append(filename)
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").symlink_to(POCKET)

    names = {}
    exec(cells[0], names)
    assert SMALL.keys() <= names.keys()
    names |= SMALL
    for cell in cells[1:]:
        exec(cell, names)
    said = capsys.readouterr().out
    assert f"τ before: {names['before'].acceptance_length:.3f}" in said
    assert "| after |" in said and "vllm serve" in said
    assert [path.read_bytes()[:4] for path in shown] == [b"\x89PNG"]
    assert (tmp_path / names["output_dir"] / "model.safetensors").is_file()


def test_one_cell_says_all_that_is_ones_own(cells):
    """With a model of one's own that cell alone is changed, so nothing after it names the pocket world."""
    later = [node for cell in cells[1:] for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)]
    assert "pocket" not in {node.id for node in later}
