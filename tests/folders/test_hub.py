"""Pushes to a Hub on loopback, over HTTP: what arrives, that it loads by id, and what is said when it does not."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ANY_KIND, HUB_SOCKET, KINDS, TRAVELLING, random_prompts, save_target, tiny_drafter
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import LoraConfig
from runs import make_trainer
from safetensors.torch import load
from transformers import AutoModel

from draft_opd_trl import SpeculationSettings, load_drafter, push_drafter, speculate
from draft_opd_trl.core.target import Target
from draft_opd_trl.folders.hub import merged
from draft_opd_trl.training import hub_trainer


TOKEN = "hf_ThisIsTheTokenOfTheTests"
SETTINGS = SpeculationSettings(20, [0], batch_size=8)


@pytest.fixture(scope="module")
def server():
    server = HubServer(HUB_SOCKET, TOKEN)
    yield server
    server.shutdown()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """An empty Hub that can be reached, a token for it, and an empty cache."""
    server.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="module")
def texts(model):
    prompts = [[5 + token % 25 for token in prompt] for prompt in random_prompts(8, seed=3)]
    rollout = speculate(Target(model), None, prompts, SETTINGS)
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": rollout.completions()})


def start(kind, model, folder):
    tiny_drafter(kind, Target(model)).save_pretrained(folder)
    return str(folder)


def build(drafter, model, texts, output_dir, **options):
    prompts = texts.select_columns(["prompt_ids"])
    options = {"save_strategy": "steps", "save_steps": 1, **options}
    return make_trainer(drafter, model, texts, output_dir, eval_dataset=prompts, **options)


@pytest.fixture
def make(model, texts, tmp_path):
    """`make(kind)`: a trainer in `tmp_path / "out"` of a new drafter, whose folder is `tmp_path / "start"`."""

    def trainer(kind=ANY_KIND, **options):
        return build(start(kind, model, tmp_path / "start"), model, texts, tmp_path / "out", **options)

    return trainer


def proposals(drafter, target):
    drafter.eval()
    blocks = speculate(target, drafter.bind(target), random_prompts(6, seed=11), SETTINGS).blocks
    return torch.cat([blocks.anchors[:, None], blocks.draft_tokens], dim=1)


def assert_serves(files, trainer, tmp_path):
    """At the top level nothing but what `save_pretrained` of a whole drafter writes, and a card."""
    folder = start(trainer.drafter.kind, trainer.target.model, tmp_path / "whole")
    assert {name for name in files if "/" not in name} == {*os.listdir(folder), "README.md"}


def assert_names_no_machine(files, tmp_path):
    for secret in (TOKEN, str(tmp_path), str(Path.home()), str(Path.cwd())):
        assert [name for name, content in files.items() if secret.encode() in content] == [], secret


def assert_loads_as_trained(repo, trainer):
    loaded = load_drafter(repo)
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if "checkpoint" in path.name]
    assert torch.equal(proposals(loaded, trainer.target), proposals(trainer.drafter, trainer.target))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_pushes_is_what_it_trained(hub, make, kind, tmp_path):
    trainer = make(kind, push_to_hub=True)
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.push_to_hub(dataset_name="user/prompts")
    assert hub.messages[-2:] == ["Model save", "End of training"]
    files = hub.files("user/out")
    assert_serves(files, trainer, tmp_path)
    assert_names_no_machine(files, tmp_path)
    pushed = load(files["model.safetensors"])
    assert pushed.keys() == trainer.drafter.state_dict().keys()
    assert_loads_as_trained("user/out", trainer)
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["user/prompts"]
    assert [result.metric_type for result in card.data.eval_results][:2] == ["acceptance_length", "acceptance_slot_1"]
    assert "| before training | after step 2 |" in card.text and "None" not in card.text
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("_push")} == set()


def test_large_files_go_through_lfs(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large = (".safetensors",)
    target = Target(model)
    drafter = tiny_drafter(ANY_KIND, target)
    push_drafter(drafter, "user/large")
    assert len(hub.blobs) == 1
    assert torch.equal(proposals(load_drafter("user/large"), target), proposals(drafter, target))


@pytest.mark.parametrize("kind", TRAVELLING)
def test_transformers_loads_it_by_id(hub, kind, model, code_cache):
    """With the code that came along, not with this package's."""
    target = Target(model)
    drafter = tiny_drafter(kind, target)
    push_drafter(drafter, "user/mine")
    loaded = AutoModel.from_pretrained("user/mine", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.user.mine.")
    assert torch.equal(proposals(loaded, target), proposals(drafter, target))


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_during_training(hub, make, tmp_path, strategy):
    trainer = make(
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="acceptance_length",
        greater_is_better=True,
    )
    trainer.train()
    assert hub.messages == ["Training in progress, step 1", "Training in progress, step 2"]
    files = hub.files("user/out")
    assert_serves(files, trainer, tmp_path)
    assert_names_no_machine(files, tmp_path)
    assert_loads_as_trained("user/out", trainer)
    folders = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    assert {name.split("/")[0] for name in files if "/" in name} == folders[strategy]
    for folder in folders[strategy]:
        assert {f"{folder}/optimizer.pt", f"{folder}/draft_opd_state_0.pt"} <= files.keys()
        assert f"{folder}/training_args.bin" not in files
        # It was set, so there was a path to take out.
        assert json.loads(files[f"{folder}/trainer_state.json"])["best_model_checkpoint"].startswith("checkpoint-")


def test_a_checkpoint_from_the_hub_continues_the_run(hub, model, texts, tmp_path):
    drafter = start(ANY_KIND, model, tmp_path / "start")
    steps = {"max_steps": 3, "per_device_train_batch_size": 2}
    push = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    whole = build(drafter, model, texts, tmp_path / "out", **steps, **push)
    whole.evaluate()
    whole.train()
    folder = snapshot_download("user/out", allow_patterns="checkpoint-2/*")
    resumed = build(drafter, model, texts, tmp_path / "again", **steps)
    resumed.evaluate()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    for name, value in whole.drafter.named_parameters():
        assert torch.equal(value, resumed.drafter.get_parameter(name)), name
    assert [log["step"] for log in resumed.state.log_history if "eval_acceptance_length" in log] == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_pushed_as_a_whole_drafter(hub, make, kind, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make(
        kind,
        peft_config=config,
        push_to_hub=True,
        hub_strategy="checkpoint",
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("user/out")
    assert_serves(files, trainer, tmp_path)
    assert_names_no_machine(files, tmp_path)
    assert "last-checkpoint/adapter_model.safetensors" in files
    assert_loads_as_trained("user/out", trainer)
    start_tensors = load((tmp_path / "start" / "model.safetensors").read_bytes())
    changed = {
        name for name, value in load(files["model.safetensors"]).items() if not torch.equal(value, start_tensors[name])
    }
    assert changed == {name for name in start_tensors if "q_proj" in name or "v_proj" in name}
    # A copy of the target would double its memory.
    assert merged(trainer.model).target is trainer.target
    # Pushing has not merged the adapter into the drafter in training.
    assert before.keys() == trainer.model.state_dict().keys()


def test_the_best_weights_are_pushed_with_their_own_figures(hub, make):
    trainer = make(
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="acceptance_length",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 2
    trainer.push_to_hub()
    card = ModelCard(hub.files("user/out")["README.md"].decode())
    assert "| | after step 1 |" in card.text
    assert card.data.eval_results[0].metric_value == round(trainer.state.best_metric, 4)
    assert card.data.eval_results[0].metric_value == round(trainer.evaluate()["eval_acceptance_length"], 4)


def test_a_drafter_is_pushed_and_leaves_a_card_that_is_there(hub, model, tmp_path):
    target = Target(model)
    drafter = tiny_drafter(ANY_KIND, target)
    push_drafter(drafter, "user/mine")
    files = hub.files("user/mine")
    drafter.save_pretrained(tmp_path / "saved")
    assert set(files) == {*os.listdir(tmp_path / "saved"), "README.md"}
    assert_names_no_machine(files, tmp_path)
    card = files["README.md"].decode()
    assert f"A drafter (**{ANY_KIND}**) for speculative decoding with `Qwen3ForCausalLM`" in card
    hub.commit("user/mine", {"README.md": b"---\nlicense: mit\n---\nby hand"}, "edit")
    push_drafter(load_drafter("user/mine"), "user/mine")
    assert hub.files("user/mine")["README.md"].endswith(b"by hand")


def test_the_card_names_the_target_by_id_and_revision(hub, model, texts, tmp_path):
    """Drafter and target both come from the Hub."""
    save_target(model, tmp_path / "target")
    drafter = start(ANY_KIND, model, tmp_path / "start")
    for repo, folder in (("user/target", tmp_path / "target"), ("user/start", Path(drafter))):
        hub.repos[repo] = []
        hub.commit(repo, {file.name: file.read_bytes() for file in folder.iterdir()}, "upload")
    revision = hub.commit("user/target", {"README.md": b"---\nlicense: apache-2.0\n---\n# Target"}, "card")
    hub.commit("user/target", {"README.md": b"---\nlicense: mit\n---\n# Later"}, "card")
    args = {"teacher_model_init_kwargs": {"revision": revision}, "push_to_hub": True, "hub_model_id": "user/out"}
    trainer = build("user/start", "user/target", texts, tmp_path / "out", **args)
    trainer.push_to_hub()
    card = ModelCard(hub.files("user/out")["README.md"].decode())
    assert card.data.base_model == "user/target"
    assert card.data.license == "apache-2.0"
    assert f"[`user/target`](https://huggingface.co/user/target/tree/{revision})" in card.text
    assert "| trained from | [`user/start`](https://huggingface.co/user/start) |" in card.text


# -- when it goes wrong --------------------------------------------------------------------------------------------


REMEDIES = {401: "hf auth login", 403: "The token may not write there", 409: "Something else is writing there"}


@pytest.mark.parametrize("status", REMEDIES)
def test_a_push_that_is_refused_has_saved_the_drafter(hub, make, tmp_path, status):
    trainer = make(save_strategy="no")
    hub.refuse = {"commit": (status, "no")}
    with pytest.raises(OSError, match=f"Could not push to user/out .*{REMEDIES[status]}.*is saved in {tmp_path}/out"):
        trainer.push_to_hub()
    assert torch.equal(
        proposals(load_drafter(str(tmp_path / "out")), trainer.target), proposals(trainer.drafter, trainer.target)
    )
    hub.refuse = {}
    trainer.push_to_hub()
    assert_loads_as_trained("user/out", trainer)


def test_a_network_that_goes_away_costs_nothing(hub, make, tmp_path, monkeypatch):
    trainer = make(max_steps=1)
    trainer.train()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="OfflineModeIsEnabled.*Check the name and the network.*is saved in"):
        trainer.push_to_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.deaf = True
    with pytest.raises(OSError, match="Check the name and the network.*is saved in"):
        trainer.push_to_hub()
    assert load_drafter(str(tmp_path / "out")).kind == ANY_KIND


def test_a_push_that_fails_in_the_background_is_told_and_training_goes_on(hub, make, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(hub_trainer.logger, "warning", told.append)
    trainer = make(push_to_hub=True)
    hub.refuse = {"commit": (403, "no")}
    trainer.train()
    assert trainer.state.global_step == 2
    assert told and "The token may not write there" in told[0]
    assert f"Training goes on; the weights are in {tmp_path}/out/checkpoint-1." in told[0]
    hub.refuse = {}
    trainer.push_to_hub()
    assert_loads_as_trained("user/out", trainer)


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_that_cannot_be_made_stops_before_training(hub, make, status):
    hub.refuse = {"create": (status, "no")}
    with pytest.raises(OSError, match=f"Could not push to out.*{REMEDIES[status]}.*Nothing was pushed"):
        make(push_to_hub=True)


def test_no_token_or_no_network_is_said_before_anything_is_loaded(hub, texts, tmp_path, monkeypatch):
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="push_to_hub=True, but there is no token.*`hf auth login`"):
        build(nowhere, nowhere, texts, tmp_path / "out", push_to_hub=True)
    # A token of its own gets past that, so the next thing to be missing is the target.
    with pytest.raises(OSError, match="nowhere"):
        build(nowhere, nowhere, texts, tmp_path / "out", push_to_hub=True, hub_token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="push_to_hub=True, but HF_HUB_OFFLINE is set"):
        build(nowhere, nowhere, texts, tmp_path / "out", push_to_hub=True, hub_token=TOKEN)


def test_a_drafter_that_cannot_be_pushed_says_why(hub, model):
    hub.refuse = {"preupload": (403, "no")}
    with pytest.raises(
        OSError, match="Could not push to user/mine.*The token may not write there.*Nothing was pushed"
    ):
        push_drafter(tiny_drafter(ANY_KIND, Target(model)), "user/mine")
