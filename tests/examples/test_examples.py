"""The shipped scripts on the shipped pocket world, small enough to run everywhere."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import HELD_OUT, POCKET, ROOT, SHIPPED, SHIPPED_KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import (
    SpeculationSettings,
    Target,
    load_drafter,
    speculate,
    stop_token_ids,
)


@pytest.fixture
def scripts(monkeypatch):
    """`examples/` and the pocket world's own folder, importable as the scripts see them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(POCKET))


@pytest.mark.parametrize(("kind", "temperature"), [*((kind, 0.0) for kind in SHIPPED_KINDS), ("dflash-narrow", 1.0)])
def test_quickstart_writes_what_it_promises(scripts, kind, temperature, tmp_path):
    from quickstart import QuickstartArguments, main

    small = {"max_steps": 2, "batch_size": 2, "eval_prompts": 4, "max_new_tokens": 48}
    results = main(QuickstartArguments(kind, temperature, str(tmp_path), seed=3, **small))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("tau_start", "tau_sft", "tau_sft_equal_time", "tau_opd"):
        assert 1 < results[name] <= 16, name
    assert results["prompts"] == 4
    assert results["seed"] == 3
    assert set(results["texts_changed"].values()) == ({0} if temperature == 0 else {None})
    difference = results["opd_minus_sft"]
    assert difference["mean"] == pytest.approx(results["tau_opd"] - results["tau_sft"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    table = (tmp_path / "results.md").read_text()
    assert f"{results['tau_opd']:.3f}" in table and f"at temperature {temperature:g}" in table
    assert (tmp_path / "tau.png").read_bytes().startswith(b"\x89PNG")
    start, trained = load_drafter(str(POCKET / f"drafter-{kind}")), load_drafter(str(tmp_path / "drafter-opd"))
    unmoved = [name for name, value in trained.named_parameters() if torch.equal(value, start.state_dict()[name])]
    assert unmoved == []
    assert (tmp_path / "drafter-sft" / "config.json").is_file()


def run_script(name, options, folder):
    """What the script prints, started in `folder`."""
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_train_trains_measures_and_saves_a_drafter(tmp_path):
    options = {
        "model_name_or_path": SHIPPED[0],
        "teacher_model_name_or_path": POCKET / "target",
        "dataset_name": HELD_OUT,
        "num_eval_prompts": 2,
        "max_steps": 2,  # the first is of the warm-up, at a rate of 0
        "per_device_train_batch_size": 2,
        "max_completion_length": 32,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": "run",
    }
    printed = run_script("train.py", [f"--{name}={value}" for name, value in options.items()], tmp_path)
    assert "eval_acceptance_length" in printed
    assert "Drafter saved to run." in printed
    start, trained = load_drafter(str(SHIPPED[0])), load_drafter(str(tmp_path / "run"))
    unmoved = [name for name, value in trained.named_parameters() if torch.equal(value, start.state_dict()[name])]
    assert unmoved == []


def test_evaluate_measures_the_pocket_pair_and_finds_it_lossless(tmp_path):
    options = ["--num_prompts", "4", "--max_new_tokens", "64", "--output_dir", "run", "--json"]
    result = json.loads(run_script("evaluate.py", options, tmp_path))
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == result
    ((name, measured),) = result["results"][0]["drafters"].items()
    assert measured["texts"] == {"checked": 4, "changed": 0, "at_ties": 0, "largest_gap": 0.0}
    assert measured["interval"][0] <= measured["acceptance_length"] <= measured["interval"][1]
    assert (tmp_path / "run" / f"pocket-t0-{name}.jsonl").is_file()


@pytest.mark.parametrize("kind", SHIPPED_KINDS)
def test_the_shipped_drafter_keeps_its_acceptance_length(scripts, kind):
    """The weights in the repository are those the card speaks of: same target, same τ, to sampling of prompts."""
    from pocket import read_prompts

    report = json.loads((POCKET / f"drafter-{kind}" / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    target, tokenizer = Target(model), AutoTokenizer.from_pretrained(POCKET / "target")
    drafter = load_drafter(str(POCKET / f"drafter-{kind}")).bind(target)
    prompts = read_prompts(tokenizer, "heldout.jsonl", 24)
    rollout = speculate(target, drafter, prompts, SpeculationSettings(512, stop_token_ids(model, tokenizer)))
    tau = float((rollout.completion_lengths - 1).sum()) / len(rollout.blocks)
    final = list(report["acceptance_length_by_step"].values())[-1]
    assert tau == pytest.approx(final, rel=0.15)
    if "until its acceptance length stood still" in (POCKET / f"drafter-{kind}" / "README.md").read_text():
        assert abs(report["change_over_last_quarter"]) < 0.01


def test_pocket_problems_are_checked_and_splits_are_disjoint(scripts):
    import tasks

    for kind in tasks.KINDS:
        problem = tasks.make_problem(random.Random(kind), kind)
        assert tasks.check_answer(problem, problem["answer_text"]), kind
        assert not tasks.check_answer(problem, "Answer: nothing of the kind"), kind
    splits = {split: {row["prompt"] for row in tasks.problems(split, 60)} for split in ("train", "sft", "heldout")}
    assert all(len(prompts) == 60 for prompts in splits.values())
    assert not splits["train"] & splits["heldout"]
    assert not splits["sft"] & splits["heldout"]


def test_losses_under_a_frozen_head_are_compared(tmp_path):
    sizes = ["--slots", "40", "--width", "8", "--vocabulary", "60", "--repeats", "2"]
    printed = run_script("benchmarks/frozen_head.py", sizes, tmp_path)
    ratios = json.loads(printed.splitlines()[-1])
    assert set(ratios) == {"ce", "forward_kl"} and min(ratios.values()) > 0
