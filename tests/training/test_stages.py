"""SFT and Draft-OPD as stages of one command: what each is set to, which texts they read, where a run goes on."""

import json
import shutil

import pytest
import torch
from conftest import ANY_KIND, save_target, tiny_drafter
from datasets import Dataset
from runs import make_trainer, spelled_prompts

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer, load_drafter
from draft_opd_trl.cli import main
from draft_opd_trl.core.errors import ExistsError, InputError
from draft_opd_trl.core.target import Target
from draft_opd_trl.training.stages import sft_config, where_stages_start, write_ahead


@pytest.fixture
def folder(model, tmp_path):
    tiny_drafter(ANY_KIND, Target(model)).save_pretrained(tmp_path / "drafter")
    save_target(model, tmp_path / "target")
    Dataset.from_dict({"prompt_ids": spelled_prompts(12)}).to_json(tmp_path / "prompts.jsonl")
    return tmp_path


def train(folder, *more):
    """`draft-opd train` with both stages on what lies in `folder`."""
    words = ["train", "--model", folder / "drafter", "--teacher", folder / "target"]
    words += ["--dataset_name", folder / "prompts.jsonl", "--output_dir", folder / "out", "--report_to", "none"]
    words += ["--num_eval_prompts", 4, "--sft_steps", 2, "--max_steps", 2, "--per_device_train_batch_size", 4]
    words += ["--max_completion_length", 16, "--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 1]
    words += ["--disable_tqdm", "true"]
    return main([str(word) for word in [*words, *more]])


@pytest.fixture
def seen(monkeypatch):
    """Folders of the stages that measured and trained, in order."""
    found = {"measured": [], "trained": []}
    for name, method in (("measured", "measure"), ("trained", "train")):
        original = getattr(DraftOPDTrainer, method)

        def noted(trainer, *args, _original=original, _found=found[name], **kwargs):
            _found.append(trainer.args.output_dir.rpartition("/")[2])
            return _original(trainer, *args, **kwargs)

        monkeypatch.setattr(DraftOPDTrainer, method, noted)
    return found


def weights(folder):
    return dict(load_drafter(str(folder)).named_parameters())


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_one_command_goes_the_whole_way_and_goes_on_where_it_was(folder, seen, capsys):
    out, sft = folder / "out", folder / "out" / "sft"
    assert train(folder) == 0
    # The drafter that SFT ended with is the one that Draft-OPD begins with, and is not measured twice.
    assert seen == {"measured": ["sft", "sft", "out"], "trained": ["sft", "out"]}
    start, between, trained = (weights(path) for path in (folder / "drafter", sft, out))
    assert not same(start, between) and not same(between, trained)
    printed, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert "| | drafter | SFT | Draft-OPD |" in printed and "| change of τ, paired |  | " in printed
    assert [results[when]["drafter"] for when in ("start", "before", "after")] == ["drafter", "SFT", "Draft-OPD"]
    assert list(results["gains"]) == ["SFT − drafter", "Draft-OPD − drafter", "Draft-OPD − SFT"]
    assert results["gains"]["Draft-OPD − SFT"] == results["difference"]
    tau = [results[when]["acceptance_length"] for when in ("start", "after")]
    assert results["gains"]["Draft-OPD − drafter"]["mean"] == pytest.approx(tau[1] - tau[0])
    assert "Draft-OPD − SFT: " in printed and f"vllm serve {folder / 'target'}" in printed
    assert (out / "trace.html").is_file() and str(out / "trace.html") in printed
    assert "| | before training | after step 2 |" in (out / "README.md").read_text()
    assert "By SFT, the baseline of" in (sft / "README.md").read_text()
    # Texts are written once.
    logs = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [log["rollout/cached"] for log in logs if "rollout/cached" in log] == [1.0, 1.0]

    # Without being told to go on, nothing is mixed.
    with pytest.raises(SystemExit):
        train(folder)
    assert "holds the finished SFT stage of an earlier run. Go on with" in capsys.readouterr().err

    # Cut off in Draft-OPD: SFT is skipped.
    seen["measured"].clear(), seen["trained"].clear()
    shutil.rmtree(out / "checkpoint-2")
    assert train(folder, "--resume_from_checkpoint") == 0
    assert seen == {"measured": ["out"], "trained": ["out"]} and same(trained, weights(out))
    assert json.loads((out / "results.json").read_text())["gains"] == results["gains"]

    # Cut off between the stages, and in SFT.
    seen["measured"].clear(), seen["trained"].clear()
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(sft / "checkpoint-2")
    (sft / "stage.json").unlink()
    assert train(folder, "--resume_from_checkpoint") == 0
    assert seen == {"measured": ["sft", "out"], "trained": ["sft", "out"]} and same(trained, weights(out))
    assert json.loads((out / "results.json").read_text())["gains"] == results["gains"]


def test_texts_are_written_at_full_width_before_the_first_step(folder, model, tmp_path):
    drafter, prompts = tiny_drafter(ANY_KIND, Target(model)), Dataset.from_json(str(folder / "prompts.jsonl"))
    options = {"rollout_source": "generate", "rollout_batch_size": 5, "max_steps": 2, "lmbda": 0.0}
    trainer = make_trainer(drafter, model, prompts, tmp_path / "out", **options)
    widths, write = [], trainer.source.source.write
    trainer.source.source.write = lambda rows, draw=0: (widths.append(len(rows)), write(rows, draw))[1]
    write_ahead(trainer)
    assert widths == [5, 3]  # of the twelve, those that two steps of four read
    trainer.train()
    assert widths == [5, 3]


def config(tmp_path, **options):
    return DraftOPDConfig(str(tmp_path / "out"), report_to="none", **options)


def test_the_sft_stage_is_plain_sft_on_the_same_texts(tmp_path):
    run = config(tmp_path, recipe="paper", replay_buffer_size=8, replay_ratio=0.5, lmbda_end=0.5, seed=3)
    sft = sft_config(run, 7, 0.0, None)
    assert (sft.lmbda, sft.lmbda_end, sft.replay_ratio, sft.rejected_weight) == (0, None, 0, 0)
    assert (sft.accepted_loss, sft.max_steps, sft.learning_rate, sft.optim) == ("forward_kl", 7, 6e-4, "adamw_torch")
    out = tmp_path / "out"
    assert (sft.output_dir, sft.text_cache_dir) == (str(out / "sft"), str(out / "_text_cache"))
    assert sft.rollout_source == "generate" and sft.seed == 3
    assert (run.lmbda, run.rollout_source, run.text_cache_dir) == (1.0, "speculation", None)
    sft = sft_config(config(tmp_path, rollout_source="dataset", max_steps=9, text_cache_dir="here"), 0, 1.5, 1e-3)
    assert (sft.max_steps, sft.num_train_epochs, sft.learning_rate) == (-1, 1.5, 1e-3)
    assert (sft.rollout_source, sft.text_cache_dir) == ("dataset", "here")
    assert sft_config(config(tmp_path), 1, 0.0, None).learning_rate == 4e-3


@pytest.mark.parametrize(
    ("there", "resume", "error", "told"),
    [
        ("sft/checkpoint-1", None, ExistsError, "sft holds checkpoint-1 of an earlier run"),
        ("checkpoint-1", None, ExistsError, "out holds checkpoint-1 of an earlier run"),
        ("checkpoint-1", "true", InputError, "holds no finished SFT stage that Draft-OPD could have begun from"),
        ("sft", "elsewhere/checkpoint-1", InputError, "holds no finished SFT stage that Draft-OPD could"),
    ],
)
def test_runs_are_not_mixed(tmp_path, there, resume, error, told):
    (tmp_path / "out" / there).mkdir(parents=True)
    run = config(tmp_path, resume_from_checkpoint=resume)
    with pytest.raises(error, match=told):
        where_stages_start(run, sft_config(run, 1, 0.0, None))


def test_a_finished_stage_is_not_begun_again(tmp_path, caplog):
    run = config(tmp_path, resume_from_checkpoint="true")
    sft = sft_config(run, 1, 0.0, None)
    start = where_stages_start(run, sft)
    assert (start.done, start.sft, start.opd) == (None, None, None)  # cut off before its first checkpoint
    done = {"settings": {"learning_rate": 0.5}, "measured": {}}
    (tmp_path / "out" / "sft").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "stage.json").write_text(json.dumps(done))
    assert where_stages_start(run, sft).done == done
    assert "finished, with other settings:" in caplog.text and "learning_rate 0.5 there, 0.004 here" in caplog.text
    run.resume_from_checkpoint = str(tmp_path / "out" / "sft" / "checkpoint-1")
    with pytest.raises(InputError, match="is finished. Go on with Draft-OPD"):
        where_stages_start(run, sft)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sft_epochs", "1"], "sft_steps=2 and sft_epochs=1 are both set"),
        (["--lmbda", "0"], "lmbda=0 is SFT alone"),
        (["--use_peft"], "use_peft trains an adapter, and the SFT stage all weights"),
        (["--sft_steps", "0", "--sft_learning_rate", "1e-3"], "sft_learning_rate is set, but no SFT stage is"),
        (["--sft_steps", "-1"], "`sft_steps` is -1; it must lie in [0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(tmp_path, capsys, words, told):
    with pytest.raises(SystemExit):
        train(tmp_path, *words)
    assert told in capsys.readouterr().err
