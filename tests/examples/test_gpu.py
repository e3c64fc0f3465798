"""The command of examples/benchmarks/gpu.py, tiny and on a CPU: whole, resumed, and with a part that fails."""

import json
import shutil

import pytest
import torch
from conftest import POCKET, ROOT, random_prompts
from torch.utils.flop_counter import FlopCounterMode

from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.training import block_choice


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import gpu

    return gpu


def arguments(gpu, folder, **options):
    return gpu.GpuArguments(output_dir=str(folder), size="tiny", **options)


def test_all_parts_run_once_and_say_what_a_cpu_can(gpu, tmp_path, capsys):
    parts = [name for name in gpu.parts_of(arguments(gpu, tmp_path)) if "8B" not in name]  # these differ in size alone
    args = arguments(gpu, tmp_path, parts=parts)
    line = gpu.main(args, gpu.run_here)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: part.get("error") for name, part in results["parts"].items()} == dict.fromkeys(parts)
    # What needs the device's name or its allocator is not told.
    assert (line["device"], line["mfu"], line["plan_over_peak"]) == ("cpu", None, None)
    assert line["invariants_ok"] is True, results["parts"]["invariants"]["result"]
    assert line["opd_over_sft"] > 0 and line["rollout_over_replay"] > 0 and line["speculation_over_limit"] > 0
    check_figures({name: part["result"] for name, part in results["parts"].items()})

    def refuse(*_):
        raise AssertionError("a part that is done runs again")

    assert gpu.main(args, refuse) == line


def check_figures(found):
    """What was planted is what was found."""
    steps = found["steps-4B-dflash"]
    by_replay, by_rollout = steps["Draft-OPD by replay"], steps["Draft-OPD by rollout"]
    # Runs of 0, 2, 4, 6 and 8 of seven slots, cut at the end of texts of forty tokens.
    assert by_replay["tau"] == pytest.approx(by_rollout["tau"])
    assert 3.5 < by_replay["tau"] < 5.5
    assert steps["SFT"]["tflops"] > 0 and steps["SFT"]["plan_gib"] > 0
    assert all(arm["ms"] > 0 and arm["blocks"] > 0 for arm in steps.values())
    alone = found["decoding"]["batch 1"]
    assert alone["limit"] == pytest.approx(1e3 * alone["tau"] / alone["verification_ms"])
    assert alone["native DFlash"] > 0
    for case in found["graphs"].values():
        assert case["cuda_graph"] is None
        assert case["compiled"]["largest_difference"] < 1e-4
    assert len(found["growth"]) == 4
    assert [point["step"] for point in found["pocket"]["curve"]] == [0, 1, 2]


def test_a_part_that_fails_loses_no_other_and_runs_again(gpu, tmp_path):
    world = tmp_path / "world"
    options = {"parts": ["world"], "world": str(world)}
    line = gpu.main(arguments(gpu, tmp_path, **options))  # in a process of its own
    assert line["opd_over_sft"] is None
    file = tmp_path / "results.json"
    failed = json.loads(file.read_text())
    assert failed["parts"]["world"]["status"] == "failed"
    assert "holds no target/" in failed["parts"]["world"]["error"]
    assert "Traceback" in (tmp_path / "world.log").read_text()
    for name in ("target", "drafter-dflash-narrow", "prompts"):
        shutil.copytree(POCKET / name, world / name)
    gpu.main(arguments(gpu, tmp_path, **options), gpu.run_here)
    assert json.loads(file.read_text())["parts"]["world"]["status"] == "done"


def test_a_part_that_takes_too_long_is_stopped(gpu, tmp_path):
    args = arguments(gpu, tmp_path)
    gpu.run_apart(args, "invariants", limit=0.2)
    found = json.loads((tmp_path / "invariants.json").read_text())
    assert found["status"] == "failed" and "more than 0 s" in found["error"]


def test_what_does_not_fit_is_left_out(gpu, tmp_path, capsys):
    line = gpu.main(arguments(gpu, tmp_path, minutes=0.1), lambda *_: pytest.fail("there is no time"))
    assert {value for name, value in line.items() if name != "device"} == {None}
    assert "invariants: left out, as it should take" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [({"parts": ["step"]}, "There are no parts"), ({}, "holds results of")],
    ids=["unknown part", "another machine"],
)
def test_what_cannot_be_run_is_refused(gpu, tmp_path, options, said):
    (tmp_path / "results.json").write_text('{"machine": {"device": "NVIDIA H100"}, "parts": {}}')
    with pytest.raises(SystemExit, match=said):
        gpu.main(arguments(gpu, tmp_path, **options))


def test_a_bad_invariant_is_told(gpu):
    parts = {"invariants": {"status": "failed", "result": {"dflash, float32": {"lossless": "ok"}}}}
    results = {"machine": {"device": "cpu"}, "parts": parts}
    assert gpu.line_of(results)["invariants_ok"] is None
    parts["invariants"]["result"]["dflash, float32"]["lossless"] = "AssertionError"
    assert gpu.line_of(results)["invariants_ok"] is False


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_flops_are_those_of_a_real_step(gpu, kind, tmp_path, monkeypatch):
    """Counted on the run itself, where nothing is computed twice, and no block is cut by its text's end."""
    from memory import small_tokenizer
    from on_gpu import planted, steps
    from step import ARMS, Arm

    def first_anchors(length, prompt_length, count, generator):
        return torch.arange(count) + prompt_length

    monkeypatch.setattr(block_choice, "random_anchors", first_anchors)
    size = planted.TINY
    target = planted.planted_target(size.targets["Qwen3-4B"], torch.device("cpu"))
    drafter = planted.planted_drafter(size, kind, target)
    args = steps.settings(size, str(tmp_path), loss_chunk_size=4096, **ARMS["SFT"])
    texts = planted.planted_texts(size, 2 * size.texts, size.completion_length)
    arm = Arm(args, drafter, target.model, small_tokenizer(), texts)
    rows = next(arm.rows)
    with FlopCounterMode(display=False) as counter:
        arm.trainer.training_step(arm.trainer.model, rows)
    assert steps.model_flops(target.config, drafter.config, args, size.prompt_length) == counter.get_total_flops()


def test_planted_texts_are_what_the_target_writes(gpu):
    from on_gpu import planted

    target = planted.planted_target(planted.TINY.targets["Qwen3-4B"], torch.device("cpu"))
    prompts = [[token + 3 for token in prompt] for prompt in random_prompts(5)]
    written = speculate(target, None, prompts, SpeculationSettings(9, [])).completions()
    assert written == [[prompt[-1]] * 9 for prompt in prompts]


def test_rates_of_known_devices(gpu):
    from on_gpu.steps import peak_rate

    assert peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_rate("NVIDIA H100 PCIe") == 756e12
    assert peak_rate("Some other accelerator") is None
