"""The journey over a real model, on the pocket world's: every stage once, none twice, and the line at its end."""

import importlib
import json

import pytest
from conftest import POCKET, ROOT

from draft_opd_trl import load_drafter
from draft_opd_trl.evaluation.results import read_reports


SHIPPED = sorted((ROOT / "examples" / "smollm").glob("drafter-*"))


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "smollm"))
    return importlib.import_module("real")


@pytest.fixture
def journey(real, tmp_path):
    lines = (POCKET / "prompts" / "quickstart.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:96]))
    return real.RealArguments(
        target=str(POCKET / "target"),
        prompts=str(tmp_path / "prompts.jsonl"),
        suites=str(POCKET / "prompts" / "heldout.jsonl"),
        kind="dflash",
        output_dir=str(tmp_path / "out"),
        sft_steps=2,
        steps=2,
        seeds=1,
        arms=real.QUICK_ARMS,
        eval_prompts=3,
        temperatures=[0.0],
        speed_prompts=0,
        max_new_tokens=16,
        store_gib=0.1,
    )


def test_from_nothing_to_a_line_of_figures(real, journey, monkeypatch, capsys):
    line = real.main(journey)
    printed = capsys.readouterr().out
    assert printed.count("$ draft-opd train") == 4 and printed.count("$ draft-opd init") == 1
    assert json.loads(printed.splitlines()[-1]) == line
    assert line["texts_changed"] == 0 and line["law"] == "heldout-t0" and line["speedup_generate_batch1"] is None
    written = json.loads((journey.output / "results.json").read_text())["laws"]["heldout-t0"]
    by_name = {name: list(read_reports(real.Path(one["file"])).values()) for name, one in written.items()}
    assert set(by_name) == {"start", "sft-continued-0", "draft-opd-0", "sft-continued-equal-time-0"}
    for key, over in (("equal_steps", "sft-continued-0"), ("equal_time", "sft-continued-equal-time-0")):
        committed, blocks = (
            [sum(map(of, by_name[name])) for name in ("draft-opd-0", over)]
            for of in (lambda text: text.tokens - 1, lambda text: len(text.accepted[0]))
        )
        expected = committed[0] / blocks[0] / (committed[1] / blocks[1]) - 1
        assert line[f"gain_{key}"] == pytest.approx(expected)
        assert line[f"gain_{key}_low"] <= expected + 1e-9
    # Again, nothing is left to do.
    monkeypatch.setattr(real, "draft_opd", None)
    assert {**real.main(journey), "seconds": 0} == {**line, "seconds": 0}


def test_the_first_arm_is_not_charged_for_the_texts_of_all(real, tmp_path):
    """By which the others' equal time would be too short."""
    parts = {"time/replay": 0.1, "time/scoring": 0.0, "time/forward": 0.3, "time/backward": 0.2}
    texts = [{"time/rollout": 9.0, "time/target_text": 1.0, "step_time": 10.6}, {"step_time": 0.6}]
    log = [{**parts, **entry} for entry in (*texts, *texts[:1])] + [{"eval_loss": 1.0}]
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert real.seconds_a_step(tmp_path) == pytest.approx(0.6)


def test_a_stage_that_was_stopped_goes_on(real, journey, monkeypatch):
    asked = []
    monkeypatch.setattr(real, "draft_opd", lambda words: asked.append(words) or 0)
    (journey.output / "sft" / "checkpoint-1").mkdir(parents=True)
    real.Journey(journey).start()
    init, train = asked
    assert init[0] == "init" and "--resume_from_checkpoint" in train


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_quick_starts_from_what_ships(real, kind):
    quick = real.RealArguments(quick=True, kind=kind, suites="a.jsonl,b.jsonl")
    assert quick.start == str(real.SHIPPED[kind]) and quick.suites == "a.jsonl" and quick.seeds == 1


def test_quick_of_a_kind_that_does_not_ship_says_so(real):
    with pytest.raises(ValueError, match="No dspark drafter ships. Give --start, or --kind eagle3 or dflash"):
        real.RealArguments(quick=True, kind="dspark")
    assert real.RealArguments(quick=True, kind="dspark", start="mine").start == "mine"


@pytest.mark.parametrize("folder", SHIPPED, ids=[folder.name for folder in SHIPPED])
def test_what_ships_loads_and_is_small(folder):
    drafter = load_drafter(str(folder))
    assert drafter.config.vocab_size == 49152 and drafter.target_layer_ids == [1, 14, 26]
    size = (folder / "model.safetensors").stat().st_size
    if drafter.kind == "eagle3":
        assert drafter.config.draft_vocab_size == 4096 and drafter.num_draft_tokens == 4
        assert size <= 16e6
    assert size <= 16 * 2**20
    for file in folder.glob("*.py"):  # `examples/pocket/build.py code` writes both
        assert file.read_text() == (POCKET / f"drafter-{drafter.kind}" / file.name).read_text()


def test_prompts_of_the_hub_become_a_file(real, journey, monkeypatch):
    journey.prompts = "openai/gsm8k"
    journey.output.mkdir()
    asked = []
    monkeypatch.setattr(real, "load_prompts", lambda *where: asked.append(where) or {"question": ["1 + 1?"]})
    file = real.Journey(journey).prompts
    assert asked == [("openai/gsm8k", "main", "train")]
    (row,) = map(json.loads, real.Path(file).read_text().splitlines())
    assert row["prompt"][0]["content"].startswith("1 + 1?\nPlease reason step by step")
    assert real.Journey(journey).prompts == file and len(asked) == 1
