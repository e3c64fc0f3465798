"""Tokens and passwords stay out of whatever is shown, logged or saved, and still do their work."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from conftest import tiny_tokenizer
from datasets import Dataset

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer
from draft_opd_trl.core.redaction import is_secret, redact_url, shown, without_secrets


SECRET = "hf_topsecret"
SETTINGS = {
    "hub_token": f"{SECRET}1",
    "server_token": f"{SECRET}2",
    "model_init_kwargs": {"token": f"{SECRET}3", "revision": "main"},
    "teacher_model_init_kwargs": {"token": f"{SECRET}4", "dtype": torch.float32, "deep": {"api_key": f"{SECRET}5"}},
    "rollout_source": "server",
    "server_url": f"http://me:{SECRET}6@localhost:8000/v1",
}


@pytest.fixture
def config(tmp_path):
    return DraftOPDConfig(str(tmp_path), report_to=[], **copy.deepcopy(SETTINGS))


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        DraftOPDConfig.to_json_string,
        lambda config: json.dumps(config.to_dict()),
        lambda config: str(config.to_sanitized_dict()),
        lambda config: pickle.dumps(config).decode("latin-1"),
    ],
)
def test_nothing_that_leaves_the_process_holds_a_secret(config, show):
    text = show(config)
    assert SECRET not in text
    # What is no secret is there.
    assert "server_url" in text and "localhost:8000" in text and "num_anchors" in text


def test_the_settings_themselves_keep_their_secrets(config):
    config.to_dict(), pickle.dumps(config)
    for twin in (config, copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)):
        for name, value in SETTINGS.items():
            assert getattr(twin, name) == value, name
    assert copy.deepcopy(config).model_init_kwargs is not config.model_init_kwargs


def test_a_pickle_has_no_token_rather_than_a_wrong_one(config):
    back = pickle.loads(pickle.dumps(config))
    assert back.hub_token is None and back.server_token is None
    assert back.model_init_kwargs == {"revision": "main"} and back.num_anchors == config.num_anchors


def test_training_with_tokens_leaves_none_on_the_disk(drafter_folder, model, tmp_path):
    """TensorBoard's files, checkpoints with their pickled arguments, the card: every byte."""
    model.save_pretrained(tmp_path / "target")
    args = DraftOPDConfig(
        str(tmp_path / "out"),
        report_to="tensorboard",
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=2,
        max_completion_length=6,
        logging_steps=1,
        disable_tqdm=True,
        **{name: value for name, value in SETTINGS.items() if not name.startswith(("server", "rollout"))}
        | {"server_token": SECRET, "teacher_model_init_kwargs": {"token": f"{SECRET}4", "dtype": "float32"}},
    )
    rows = Dataset.from_dict({"prompt_ids": [[5, 6, 7], [8, 9, 10]]})
    trainer = DraftOPDTrainer(
        drafter_folder, str(tmp_path / "target"), args, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    trainer.train()
    trainer.save_model()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"training_args.bin"} <= {file.name for file in files} and any("tfevents" in file.name for file in files)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert args.hub_token == f"{SECRET}1" and args.model_init_kwargs["token"] == f"{SECRET}3"


def test_addresses_lose_their_passwords():
    assert redact_url("http://me:pw@host:80/v1?x=1") == "http://***@host:80/v1?x=1"
    assert redact_url("http://host:80/v1") == "http://host:80/v1"
    assert "pw" not in redact_url("me:pw@host") and "pw" not in redact_url("http://me:pw@[bad")


def test_names_of_secrets():
    assert all(map(is_secret, ("token", "hub_token", "api_key", "API-KEY", "password", "Authorization")))
    assert not any(map(is_secret, ("stop_token_ids", "tokens", "num_tokens", "pad_token_id", "chat_template_kwargs")))


def test_what_json_cannot_hold_is_told_plainly():
    told = without_secrets({"dtype": torch.bfloat16, "x": {"y": (1, None, True)}, "token": True, "other": None})
    assert told == {"dtype": "bfloat16", "x": {"y": [1, None, True]}, "token": True, "other": None}
    assert shown("server_token", 5) == "a secret that is not shown"
    assert len(shown("x", "a" * 1000)) < 100 and "\n" not in shown("x", torch.zeros(9, 9))
