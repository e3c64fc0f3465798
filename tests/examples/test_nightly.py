"""The nightly loop: it asks commands for what they take, and takes a drafter only if it is better and lossless."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from draft_opd_trl.cli import COMMANDS, CommandParser


# Stands for `draft-opd`: writes down what it was asked, and what was measured.
STAND_IN = """#!{python}
import json, pathlib, sys
with open("asked.jsonl", "a") as asked:
    asked.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "train":
    pathlib.Path("night/drafter").mkdir()
    pathlib.Path("night/drafter/config.json").write_text("new")
if sys.argv[1] == "evaluate":
    pathlib.Path("night/results").mkdir()
    pathlib.Path("night/results/results.json").write_text(pathlib.Path("measured.json").read_text())
"""


@pytest.fixture
def night(tmp_path):
    """What is served after a night in which `difference` and `texts` were measured, and what the script said."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "draft-opd"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "config.json").write_text("old")
    path = os.pathsep.join([str(tmp_path / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]])

    def spend(low, texts):
        difference = {"mean": low + 0.1, "low": low, "high": low + 0.2}
        drafters = {"drafter": {"texts": texts}, "served": {"texts": texts}}
        (tmp_path / "measured.json").write_text(
            json.dumps({"results": [{"drafters": drafters, "difference": difference}]})
        )
        script = [str(ROOT / "examples" / "nightly.sh"), "target", "served/", "night", "log.jsonl", "--use_cpu"]
        done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": path})
        assert done.returncode == 0, done.stderr
        return (tmp_path / "served" / "config.json").read_text(), done.stdout

    return spend


SAME, TIES, OTHER = ({"changed": changed, "at_ties": ties} for changed, ties in [(0, 0), (2, 2), (2, 1)])


@pytest.mark.parametrize("texts", [SAME, TIES, None])
def test_a_better_drafter_takes_the_place_of_the_old_one(night, texts, tmp_path):
    assert night(0.01, texts) == (
        "new",
        "τ +0.110, at least +0.010; lossless: True\ntaken: served is the new drafter\n",
    )
    assert (tmp_path / "served.before" / "config.json").read_text() == "old"


@pytest.mark.parametrize(("low", "texts"), [(-0.01, SAME), (0.0, SAME), (0.5, OTHER)])
def test_any_other_does_not(night, low, texts, tmp_path):
    served, said = night(low, texts)
    assert served == "old" and "not taken: served stays as it was" in said
    assert not (tmp_path / "served.before").exists()


def test_commands_take_what_they_are_asked(night, tmp_path):
    night(0.0, SAME)
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [words[0] for words in asked] == ["texts", "train", "evaluate"]
    for name, *words in asked:
        CommandParser(name, importlib.import_module(COMMANDS[name])).parse(words)
