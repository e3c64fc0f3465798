"""What a run is made of: what is read, in which order, and what is refused before anything expensive.

Adapters are in test_adapters.py, quantised targets in test_quantized.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import KINDS, STOPS, tiny_drafter, tiny_model, tiny_tokenizer
from datasets import Dataset
from transformers import BitsAndBytesConfig

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.training import loading
from draft_opd_trl.training.loading import (
    check_dataset_size,
    check_drafter,
    check_texts,
    choose_pad_token,
    generation_batch_size,
    load_pair,
    load_target,
    load_tokenizer,
    warn_about_serving,
)
from draft_opd_trl.training.rollout import DatasetSource


@pytest.fixture(scope="module")
def target_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(**options):
    return DraftOPDConfig("unused", **options)


def never(*args, **kwargs):
    raise AssertionError("weights were read")


def test_a_pair_is_of_one_dtype_and_bound(drafter_folder, target_folder):
    target, drafters, tokenizer = load_pair([drafter_folder, drafter_folder], target_folder)
    assert target.dtype == torch.float32 and tokenizer.eos_token == "<|end|>"
    assert len(drafters) == 2 and all(drafter.target is target for drafter in drafters)
    target, (drafter,), _ = load_pair([drafter_folder], target_folder, dtype="auto")
    assert target.dtype == drafter.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "dtype", "words"),
    [
        (["no-such-folder"], "float32", "no-such-folder"),
        (["the target itself"], "float32", "drafter"),
        (["the drafter"], "float23", "float23"),
    ],
)
def test_a_wrong_name_shows_before_weights_are_read(drafter_folder, target_folder, monkeypatch, names, dtype, words):
    monkeypatch.setattr(loading, "read_target", never)
    known = {"the target itself": target_folder, "the drafter": drafter_folder}
    with pytest.raises((OSError, ValueError), match=words):
        load_pair([drafter_folder, *(known.get(name, name) for name in names)], target_folder, dtype)


def test_a_drafter_of_any_kind_is_known_by_its_config(drafter_folder, target_folder):
    check_drafter(drafter_folder)
    with pytest.raises(ValueError, match="and no drafter"):
        check_drafter(target_folder)


def test_the_tokenizer_is_the_one_given_or_stands_beside_the_target(model, target_folder):
    given = tiny_tokenizer()
    assert load_tokenizer("no-such-folder", settings(), given) is given
    assert load_tokenizer(target_folder, settings(), None).get_vocab() == given.get_vocab()
    instance = load_target(target_folder, settings(), None)
    assert load_tokenizer(instance, settings(), None).get_vocab() == given.get_vocab()
    with pytest.raises(ValueError, match="pass its tokenizer"):
        load_tokenizer(model, settings(), None)


def test_a_target_keeps_its_dtype_unless_it_is_told(target_folder):
    assert load_target(target_folder, settings(), None).dtype == torch.bfloat16
    args = settings(teacher_model_init_kwargs={"dtype": "float32"})
    assert load_target(target_folder, args, None).dtype == torch.float32
    assert args.teacher_model_init_kwargs == {"dtype": "float32"}


def test_an_instance_is_taken_as_it_is_and_loading_options_beside_it_are_refused(model):
    assert load_target(model, settings(), None) is model
    for args, quantization in (
        (settings(teacher_model_init_kwargs={"dtype": "float32"}), None),
        (settings(), BitsAndBytesConfig(load_in_8bit=True)),
    ):
        with pytest.raises(ValueError, match="only apply when teacher_model is a path"):
            load_target(model, args, quantization)


@pytest.mark.parametrize(
    ("tokenizers", "configured", "taken"),
    [(2, 5, 2), (None, 5, 5), (None, None, 9), (48, 5, 5), (-1, None, 9), (0, 5, 0)],
)
def test_padding_is_a_token_that_the_target_has(tokenizers, configured, taken):
    """The target reads it: an id behind its vocabulary would end a process on a GPU."""
    model = tiny_model("qwen3")
    model.generation_config.pad_token_id = configured
    assert choose_pad_token(model, SimpleNamespace(pad_token_id=tokenizers), [9, 3]) == taken


def test_a_data_set_holds_at_least_one_generation_batch():
    args = settings(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert generation_batch_size(args) == 6
    check_dataset_size(Dataset.from_dict({"prompt_ids": [[1]] * 6}), args)
    with pytest.raises(ValueError, match="5 rows, fewer than one generation batch of 6.*2 × 1 processes"):
        check_dataset_size(Dataset.from_dict({"prompt_ids": [[1]] * 5}), args)


def test_texts_of_another_writer_are_warned_of_and_the_targets_own_are_not(model, prompts, caplog):
    target, sampling = Target(model), SamplingParams()
    law = SpeculationSettings(12, STOPS, sampling)
    source = DatasetSource(target, law)
    rollout = speculate(target, None, prompts, law)
    columns = {"prompt_ids": prompts, "completion_ids": rollout.completions()}
    check_texts(Dataset.from_dict(columns), 99, source, target, sampling)
    assert not caplog.records
    columns["completion_ids"] = [[4, 5, 6] * 4 for _ in prompts]
    check_texts(Dataset.from_dict(columns), 0, source, target, sampling)
    assert not caplog.records
    check_texts(Dataset.from_dict(columns), 99, source, target, sampling)
    assert len(caplog.records) == 1 and f"tokens of {len(prompts)} texts" in caplog.text


def test_texts_to_check_are_spread_over_the_data_set(model, monkeypatch):
    read = []
    monkeypatch.setattr(loading, "text_fit", lambda *_: None)
    monkeypatch.setattr(loading, "describe_misfit", lambda *_: None)
    source = SimpleNamespace(write=lambda rows: read.extend(row["prompt_ids"][0] for row in rows))
    check_texts(Dataset.from_dict({"prompt_ids": [[row] for row in range(10)]}), 4, source, None, SamplingParams())
    assert read == [0, 2, 5, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_will_not_serve_the_drafter_is_named_once(kind, model, caplog, monkeypatch):
    PartialState()  # the logger of accelerate asks it
    target = Target(model)
    drafter = tiny_drafter(kind, target)
    warn_about_serving(drafter, target)
    assert "will serve" not in caplog.text
    monkeypatch.setattr(type(drafter.config), "served_targets", {"vLLM": frozenset({"qwen3"}), "SGLang": frozenset()})
    for _ in range(2):  # as stages of one command do
        warn_about_serving(drafter, target)
    [told] = [record.message for record in caplog.records]
    assert "Not every engine will serve this drafter: SGLang " in told and f"to a {kind} drafter" in told
    assert "with such a target it serves" in told and "vLLM" not in told
