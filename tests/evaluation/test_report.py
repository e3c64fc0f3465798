"""Table and pictures against numbers counted by hand, and the files that evaluation leaves."""

import numpy as np
import pytest
from by_hand import AFTER, BEFORE
from conftest import random_prompts
from matplotlib.colors import to_hex

from draft_opd_trl.decoding.acceptance import bootstrap_interval
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation.measure import evaluate_drafters, measure_acceptance
from draft_opd_trl.evaluation.report import acceptance_figure, acceptance_table, error_density, plot_acceptance


def test_table_by_hand():
    lines = acceptance_table({"before": BEFORE, "after": AFTER}).splitlines()
    assert lines[:2] == ["| | before | after |", "|---|---|---|"]
    cells = {
        line.split(" | ")[0].strip("| "): [cell.strip("| ") for cell in line.split(" | ")[1:]] for line in lines[2:-2]
    }
    # 5 + 3 tokens in 4 + 3 blocks; 5 + 3 in 2 + 2.
    assert [cell.split()[0] for cell in cells["τ"]] == ["1.143", "2.000"]
    assert cells["change of τ, paired"][0] == ""
    low, high = bootstrap_interval(AFTER, BEFORE)
    assert cells["change of τ, paired"][1] == f"+0.857 [{low:+.3f}, {high:+.3f}]"
    assert cells["blocks with ≥ 1 accepted"] == ["14.3%", "75.0%"]
    assert cells["blocks with ≥ 2 accepted"] == ["0.0%", "25.0%"]
    assert "over 2 prompts" in lines[-1]


def test_table_of_one_drafter_compares_nothing():
    assert "change" not in acceptance_table({"only": AFTER})


def test_the_table_says_what_to_serve_with():
    def at(size, k, speedup):
        return {"batch_size": size, "num_draft_tokens": k, "speedup": speedup}

    serving = {"after": [at(1, 2, 1.75), at(32, 0, 1.0)], "before": [at(1, 1, 1.5), at(32, 1, 1.0625)]}
    lines = acceptance_table({"before": BEFORE, "after": AFTER}, serving).splitlines()
    assert lines[-4] == "| to serve with at batch 1 | K = 1 (1.50 times plain) | K = 2 (1.75 times plain) |"
    assert lines[-3] == "| to serve with at batch 32 | K = 1 (1.06 times plain) | no drafter |"


def test_errors_by_position_by_hand():
    # Of BEFORE they stand at 1, 3, 4, 5 and 1, 2, 3, of AFTER at 5 and 1, 3. The first token, at 0, cannot be one.
    edges = np.array([1, 2, 4, 6, 9])
    np.testing.assert_allclose(error_density(BEFORE, edges)[:3], [2 / 2, 3 / 4, 2 / 2])
    np.testing.assert_allclose(error_density(AFTER, edges)[:3], [1 / 2, 1 / 4, 1 / 2])
    assert np.isnan(error_density(AFTER, edges)[3])


def test_errors_are_those_of_the_blocks(qwen_target, qwen_drafter):
    prompts, settings = random_prompts(5, seed=2), SpeculationSettings(24, [])
    counted = measure_acceptance(qwen_target, qwen_drafter, prompts, settings)
    rollout = speculate(qwen_target, qwen_drafter, prompts, settings)
    wrong = rollout.blocks.select(rollout.blocks.has_error)
    positions = wrong.error_positions - rollout.prompt_lengths[wrong.texts]
    expected = np.bincount(positions.numpy(), minlength=24)[1:] / 5
    np.testing.assert_allclose(error_density(counted, np.arange(1, 25)), expected)


HISTORY = [
    {"step": 0, "eval_acceptance_length": 1.1, "eval_acceptance_length_low": 1.0, "eval_acceptance_length_high": 1.3},
    {"step": 5, "loss": 2.0},
    {"step": 9, "eval_acceptance_length": 1.9, "eval_acceptance_length_low": 1.5, "eval_acceptance_length_high": 2.2},
]


def test_figure_shows_the_numbers():
    figure = acceptance_figure({"before": BEFORE, "after": AFTER}, {"after": HISTORY})
    tau, slots, errors, steps = figure.axes
    assert [text.get_text() for text in tau.texts] == ["1.14", "2.00"]
    for container, counted in zip(tau.containers, (BEFORE, AFTER), strict=True):
        ends = container[2][0].get_segments()[0][:, 0]
        assert tuple(ends) == pytest.approx(bootstrap_interval(counted))
    for container, counted in zip(slots.containers, (BEFORE, AFTER), strict=True):
        assert container[0].get_ydata() == pytest.approx(counted.acceptance_by_slot)
        ends = [tuple(segment[:, 1]) for segment in container[2][0].get_segments()]
        assert np.array(ends) == pytest.approx(np.array(counted.summary()["intervals_by_slot"]))
    assert len(errors.lines) == 2
    (line,), (band,) = steps.lines, steps.collections
    assert list(line.get_xdata()) == [0, 9] and list(line.get_ydata()) == [1.1, 1.9]
    assert band.get_datalim(steps.transData).bounds == pytest.approx((0, 1.0, 9, 1.2))
    # One drafter looks the same in every panel, and no other like it, colour or not.
    looks = [(to_hex(line.get_color()), line.get_marker()) for line in errors.lines]
    assert looks[1] == (to_hex(line.get_color()), line.get_marker())
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    assert all(axis.get_xlabel() and axis.get_title() for axis in figure.axes)


def test_figure_without_training_has_no_panel_for_it():
    assert [axis.get_title() for axis in acceptance_figure({"only": AFTER}).axes] == [
        "Acceptance length", "Acceptance by slot", "Where errors fall"
    ]  # fmt: skip


def test_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    plot_acceptance({"only": AFTER}, tmp_path / "new" / "tau.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tau.png"]
    before = (tmp_path / "new" / "tau.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    full = "draft_opd_trl.evaluation.report.os.replace"
    monkeypatch.setattr(full, lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        plot_acceptance({"before": BEFORE}, tmp_path / "new" / "tau.png")
    assert (tmp_path / "new" / "tau.png").read_bytes() == before


def test_evaluation_leaves_table_and_picture(qwen_target, qwen_drafter, tmp_path):
    drafters = {"model": qwen_drafter, "compare": qwen_drafter}
    prompts, settings = random_prompts(3), SpeculationSettings(8, [])
    measured = evaluate_drafters(qwen_target, drafters, prompts, settings, baseline=False, results=tmp_path / "a-t0.5")
    table = (tmp_path / "a-t0.5.md").read_text("utf-8")
    assert table.startswith("| | compare | model |\n")
    assert f"{measured['drafters']['model']['acceptance_length']:.3f}" in table
    assert (tmp_path / "a-t0.5.png").read_bytes().startswith(b"\x89PNG")
