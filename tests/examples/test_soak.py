"""`make soak`, on a scale at which it takes seconds: every part runs, and counts a broken promise as broken."""

import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT


SOAK = ROOT / "examples" / "soak"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(SOAK))


def test_each_part_runs_and_counts():
    command = [
        sys.executable,
        str(SOAK / "soak.py"),
        "--only",
        "texts,inputs,kills",
        "--scale",
        "0.001",
        "--workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seconds"] > 0
    assert result["texts"] >= 20 and result["texts_changed"] == 0
    told = (result[name] for name in ("inputs_right", "inputs_clear", "unclear", "hangs", "silently_wrong"))
    assert result["inputs"] >= 8 and sum(told) == result["inputs"]
    assert result["kills"] >= 1 and 0 <= result["kills_equal"] <= result["kills"]
    assert result["disk_full"] >= 1 and 0 <= result["disk_full_equal"] <= result["disk_full"]
    assert done.returncode == bool([line for line in done.stdout.splitlines() if line.startswith("NOT AS PROMISED")])


def test_servers_that_are_wrong_are_noticed(soak, monkeypatch):
    import servers

    monkeypatch.setattr(servers, "SET", 16)
    lines, names = [], ["a redirect", "ids outside the vocabulary", "T = 1 for greedy", "right, greedy"]
    found = servers.run(60, lines.append, 16, names)
    assert found["servers"] == found["noticed"] == 3 and found["false_alarms"] == 0
    assert found["shares"] == dict.fromkeys(names[:3], 1.0)


def test_what_is_not_as_promised_is_named(soak):
    from soak import broken_promises

    kept = {"kills": 3, "kills_equal": 3, "unclear": 0, "texts_changed": 0}
    assert broken_promises(kept) == []
    assert broken_promises({**kept, "kills_equal": 2}) == ["kills_equal is 2, not 3"]
    assert broken_promises({**kept, "unclear": 1}) == ["unclear is 1, not 0"]


def test_a_case_that_hangs_or_dies_harms_no_other(soak):
    import os
    import signal

    from forked import HANG, forked

    def act(case):
        if case == "hang":
            time.sleep(60)
        if case == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return case.upper()

    told = dict(forked(act, ["a", "hang", "die", "b"], time.monotonic() + 20, at_once=2, limit=1.0))
    assert told == {"a": "A", "hang": HANG, "die": "died with SIGKILL", "b": "B"}
    assert list(forked(act, ["a"], until=0.0)) == []


def test_verdicts(soak):
    from verdicts import CLEAR, RIGHT, UNCLEAR, WRONG, Input, verdict_of

    from draft_opd_trl.core.errors import InputError

    def kind(result, words=("depth",)):
        def act():
            if isinstance(result, Exception):
                raise result
            return result

        return verdict_of(Input("test", "it", act, words)).kind

    assert kind(None) == RIGHT
    assert kind("accepted") == WRONG
    assert kind(InputError("`depth` is -1; it must be positive.")) == CLEAR
    assert kind(InputError("it must be positive")) == UNCLEAR
    assert kind(InputError("`depth` is -1;\nit must be positive.")) == UNCLEAR
    assert kind(ValueError("`depth` is -1; it must be positive.")) == UNCLEAR


def test_no_listed_value_is_the_default_of_its_field(soak):
    """What the harness holds for wrong must not be what the package ships."""
    from bad_settings import EDGES, NAMES, bad_values

    from draft_opd_trl import DraftOPDConfig

    defaults = vars(DraftOPDConfig("unused", report_to="none"))
    assert set(EDGES) | set(NAMES) <= set(defaults)
    for name in NAMES:
        assert not any(type(value) is type(defaults[name]) and value == defaults[name] for value in bad_values(name))
