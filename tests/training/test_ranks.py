"""Several processes (gloo, CPU): they train what one process trains, share out texts, wait for each other, resume."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import cycle

import pytest
import torch
from conftest import ANY_KIND, KINDS, ROOT, STOPS, save_target, tiny_drafter, tiny_stopping_model
from datasets import Dataset
from ranks import run_case

from draft_opd_trl import SpeculationSettings, load_drafter, speculate
from draft_opd_trl.core.target import Target


BATCH = 12  # over all ranks and accumulated steps, so that it divides by two, three and four
ROWS = 40  # three whole batches; what is left of an epoch is dropped, and five steps reach into the second


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a tiny target and its drafters; texts as written, and with nothing to learn for the last rank."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_stopping_model()
    save_target(model, folder / "target")
    target = Target(model)
    for kind in KINDS:
        tiny_drafter(kind, target).save_pretrained(folder / kind)
    draws = torch.Generator().manual_seed(5)
    prompts = [
        [5 + row % 25, 5 + row // 25, *torch.randint(5, 30, (row % 4,), generator=draws)] for row in range(ROWS)
    ]
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    rollout = speculate(target, None, prompts, SpeculationSettings(20, STOPS, batch_size=16))
    completions = rollout.completions()
    Dataset.from_dict({"prompt_ids": prompts, "completion_ids": completions}).to_json(folder / "texts.jsonl")
    # A text of one token holds no block.
    bare = [text if row % BATCH < BATCH // 2 else text[:1] for row, text in enumerate(completions)]
    Dataset.from_dict({"prompt_ids": prompts, "completion_ids": bare}).to_json(folder / "bare.jsonl")
    return folder


def case_of(world, kind, texts="texts", options=None, **more):
    """A run of `ranks.py`; the dataset's texts and both streams unless `options` say otherwise."""
    pair = {"drafter": str(world / kind), "target": str(world / "target"), "texts": str(world / f"{texts}.jsonl")}
    return {**pair, "options": {"rollout_source": "dataset", "rejected_weight": 0.5, **(options or {})}, **more}


def cases(world):
    """What must not depend on how many ranks share the global batch."""
    found = {}
    for kind in KINDS:
        found[f"{kind}-dataset"] = case_of(world, kind, eval_prompts=5)
        found[f"{kind}-speculation"] = case_of(
            world, kind, options={"rollout_source": "speculation", "replay_buffer_size": 64}
        )
        found[f"{kind}-bare"] = case_of(world, kind, "bare", {"shuffle_dataset": False}, eval_prompts=1)
    drawn = {"temperature": 0.8, "sample_proposals": True, "lmbda": 0.5, "gradient_accumulation_steps": 2}
    found[f"{ANY_KIND}-drawn"] = case_of(world, ANY_KIND, options=drawn)
    return found


def taken_in_turn():
    """Names of cases, one a kind."""
    return [f"{kind}-{texts}" for kind, texts in zip(KINDS, cycle(["speculation", "dataset"]))]


def split(case, ranks):
    """The same global batch on `ranks` processes."""
    size = BATCH // ranks // case["options"].get("gradient_accumulation_steps", 1)
    options = {**case["options"], "per_device_train_batch_size": size}
    return {**case, "options": options if ranks == 1 else {**options, "ddp_backend": "gloo"}}


def launch(folder, cases, ranks, config="multi_gpu", environment=None, python=sys.executable):
    """Results of every rank, by case; launched with a shipped configuration, on the CPU."""
    folder.mkdir(exist_ok=True)
    spec = folder / "cases.json"
    cases = {name: split(case, ranks) for name, case in cases.items()}
    spec.write_text(json.dumps({"folder": str(folder), "cases": cases}))
    command = [python, "-m", "accelerate.commands.launch", "--num_processes", str(ranks), "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate_configs" / f"{config}.yaml")]
    command += [str(ROOT / "tests" / "ranks.py"), str(spec)]
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **alone, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {name: [json.loads((folder / name / f"rank{r}.json").read_text()) for r in range(ranks)] for name in cases}


def parameters_in(folder):
    return dict(load_drafter(str(folder)).named_parameters())


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """One process with the whole batch: where it saved its drafters, and what it reported."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {name: run_case(split(case, 1), folder / name) for name, case in cases(world).items()}


def assert_same_training(world, alone, folder, found):
    """Drafters, logs and evaluation of several ranks against those of one process, to rounding."""
    expected_folder, expected = alone
    for name, ranks in found.items():
        start, one = parameters_in(world / name.split("-")[0]), parameters_in(expected_folder / name)
        for key, value in parameters_in(folder / name).items():
            assert not torch.equal(value, start[key]), (name, key)
            torch.testing.assert_close(value, one[key], atol=1e-6, rtol=1e-4)
        for ours, theirs in zip(expected[name]["logs"], ranks[0]["logs"], strict=True):
            assert theirs.keys() == ours.keys()
            # Rank 0's, and what DDP averages in another order.
            own = ["time", "grad_norm"]
            if ours["step"] > ROWS // BATCH:
                # In the second epoch a rank meets texts that another one wrote: they are not its own to find.
                own += ["rollout/", "replay/buffer"]
            same = [key for key in ours if not any(part in key for part in own)]
            assert {key: theirs[key] for key in same} == pytest.approx({key: ours[key] for key in same}, rel=1e-3)
        for when in ("before", "after"):
            for key, value in (expected[name][when] or {}).items():
                if not any(part in key for part in ("seconds", "runtime", "per_second")):
                    assert [rank[when][key] for rank in ranks] == pytest.approx([value] * len(ranks)), (name, key)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_what_one_process_trains(world, alone, tmp_path, ranks):
    chosen = {name: case for name, case in cases(world).items() if ranks == 2 or "speculation" not in name}
    found = launch(tmp_path, chosen, ranks)
    assert_same_training(world, alone, tmp_path, found)
    for name, results in found.items():
        # At each generation the ranks' prompts are disjoint (no prompt occurs twice) and together the whole batch.
        for step, whole in enumerate(alone[1][name]["prompts"]):
            shared = [prompt for rank in results for prompt in rank["prompts"][step]]
            assert sorted(shared) == sorted(whole), (name, step)
        for rank in results:
            own = [prompt for step in rank["prompts"] for prompt in step]
            assert all(prompt in own for prompt in rank["remembered"])
            assert bool(rank["remembered"]) == ("speculation" in name)


RESUMED = {
    "rollout_source": "speculation",
    "temperature": 0.8,
    "lmbda": 0.5,
    "replay_buffer_size": 8,
    "replay_ratio": 0.5,
    "steps_per_generation": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}


def assert_resumed(folder, found):
    """Each case `<name>-cut` against `<name>`: drafter, buffers and losses, bit for bit."""
    for name in [name for name in found if f"{name}-cut" in found]:
        whole, cut = parameters_in(folder / name), parameters_in(folder / f"{name}-cut")
        assert [key for key, value in whole.items() if not torch.equal(value, cut[key])] == [], name
        for one, resumed in zip(found[name], found[f"{name}-cut"], strict=True):
            assert one["remembered"] == resumed["remembered"]
            assert [log["loss"] for log in one["logs"]] == [log["loss"] for log in resumed["logs"]]


def test_ranks_resume_to_the_very_same_run(world, tmp_path):
    """Cut inside a generation, in the second epoch; the buffers differ from rank to rank."""
    runs = {
        "plain": case_of(world, KINDS[-1], options=RESUMED),
        "lora": case_of(world, ANY_KIND, options=RESUMED, lora={"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    }
    runs |= {f"{name}-cut": {**case, "cut_at": 3} for name, case in runs.items()}
    assert_resumed(tmp_path, launch(tmp_path, runs, 2))


def test_sharded_ranks_train_what_one_process_trains_and_resume(world, alone, tmp_path):
    """FSDP2: rollouts, replay and evaluation call the target a different number of times on each rank."""
    names = [*taken_in_turn(), f"{KINDS[-1]}-bare"]
    runs = {name: cases(world)[name] for name in names}
    runs["resumed"] = case_of(world, ANY_KIND, options=RESUMED)
    runs["lora"] = case_of(world, KINDS[-1], options=RESUMED, lora={"r": 2, "target_modules": ["q_proj", "fc"]})
    # Without the buffer of errors, which is not the same on two ranks as on one.
    muon = {"optim": "muon", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    runs["muon"] = case_of(world, ANY_KIND, options=muon)
    runs |= {f"{name}-cut": {**runs[name], "cut_at": 3} for name in ("resumed", "lora", "muon")}
    found = launch(tmp_path, {name: {**case, "fsdp": True} for name, case in runs.items()}, 2, "fsdp2")
    for results in found.values():
        for drafter, target in (rank["sharded"] for rank in results):
            assert drafter > 0 and target > 0
    assert_same_training(world, alone, tmp_path, {name: found[name] for name in names})
    assert_resumed(tmp_path, found)
    assert_same_to_bfloat16(world, tmp_path, runs["muon"])


def assert_same_to_bfloat16(world, folder, case):
    """Muon makes its updates orthogonal in bfloat16, whose sums over shards are rounded elsewhere."""
    run_case(split({key: value for key, value in case.items() if key != "fsdp"}, 1), folder / "muon-alone")
    start, one, many = (parameters_in(path) for path in (world / ANY_KIND, folder / "muon-alone", folder / "muon"))
    for key, value in many.items():
        moved = (one[key] - start[key]).norm()
        assert moved > 0 and (value - one[key]).norm() < 0.1 * moved, key


def test_zero_ranks_train_what_one_process_trains(world, alone, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is optional, and has no wheels")
    names = taken_in_turn()
    runs = {name: cases(world)[name] for name in names}
    runs["resumed"] = case_of(world, ANY_KIND, options=RESUMED)
    runs["resumed-cut"] = {**runs["resumed"], "cut_at": 3}
    found = launch(tmp_path, runs, 2, "deepspeed_zero2", {"DS_ACCELERATOR": "cpu"})
    assert_same_training(world, alone, tmp_path, {name: found[name] for name in names})
    assert_resumed(tmp_path, found)


def test_without_deepspeed_its_configuration_says_so(world, tmp_path):
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed, so nothing is missing")
    with pytest.raises(AssertionError, match="DeepSpeed is not installed"):
        launch(tmp_path, {}, 2, "deepspeed_zero2")


def test_the_configuration_of_a_single_process_launches(world, tmp_path):
    runs = {"one": case_of(world, ANY_KIND, options={"max_steps": 1})}
    assert launch(tmp_path, runs, 1, "single_cpu")["one"][0]["logs"]
