"""Training on texts from anywhere: written once, read again by epochs and runs, resumed exactly, and checked."""

import logging

import pytest
import torch
from completions_server import CompletionsServer
from conftest import ANY_KIND, STOPS, tiny_drafter, tiny_stopping_model, tiny_tokenizer
from datasets import Dataset
from invariants import assert_same_weights
from pyarrow import parquet
from runs import StopAt, make_trainer, parameters_of, spelled_prompts, written_texts

from draft_opd_trl import SamplingParams, SpeculationSettings, speculate
from draft_opd_trl.core.target import Target
from draft_opd_trl.texts import server, sources


DRAWN = {"temperature": 0.8, "teacher_temperature": 0.8}


@pytest.fixture(scope="module")
def model():
    """Of the tiny tokenizer's vocabulary, as a server says texts in words."""
    return tiny_stopping_model(vocab_size=32)


@pytest.fixture(scope="module")
def drafter_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    tiny_drafter(ANY_KIND, Target(model)).save_pretrained(folder)
    return str(folder)


def write(model, temperature=0.0):
    return written_texts(model, spelled_prompts(16), temperature)


@pytest.fixture(scope="module")
def texts(model):
    return write(model)


@pytest.fixture
def decoded(monkeypatch):
    """Prompts that this process decoded, as they come."""
    prompts = []

    def counting(target, drafter, asked, *arguments, **options):
        prompts.extend(asked)
        return speculate(target, drafter, asked, *arguments, **options)

    monkeypatch.setattr(sources, "speculate", counting)
    return prompts


@pytest.fixture
def serving(model, monkeypatch):
    """A server of the target; at temperature > 0 it heeds seeds."""
    monkeypatch.setattr(server, "INTERVAL", 0.05)

    def answer(prompt):
        settings = SpeculationSettings(20, STOPS, SamplingParams(0.8))
        generator = torch.Generator().manual_seed(sum(prompt))
        ids = speculate(Target(model), None, [prompt], settings, generator).completions()[0]
        return ids, ids[-1] in STOPS

    with CompletionsServer(answer, tiny_tokenizer()) as serving:
        yield serving


@pytest.mark.parametrize("source", ["speculation", "generate"])
def test_later_epochs_and_runs_at_temperature_0_write_nothing(drafter_folder, model, texts, tmp_path, decoded, source):
    options = {"rollout_source": source, "max_steps": 12, "text_cache_dir": str(tmp_path / "shared")}
    first = make_trainer(drafter_folder, model, texts, tmp_path / "first", **options)
    first.train()
    assert sorted(decoded) == sorted(texts["prompt_ids"])
    shares = [log["rollout/cached"] for log in first.state.log_history if "rollout/cached" in log]
    assert shares == [0.0] * 4 + [1.0] * 8
    decoded.clear()
    make_trainer(drafter_folder, model, texts, tmp_path / "second", seed=3, **options).train()
    assert decoded == []
    folders = list((tmp_path / "shared").iterdir())
    kept = parquet.read_table(folders[0]).to_pydict()
    assert len(folders) == 1 and sorted(kept["completion_ids"]) == sorted(texts["completion_ids"])


def test_drawn_texts_are_drawn_again_when_asked(drafter_folder, model, texts, tmp_path, decoded):
    options = {"rollout_source": "generate", "max_steps": 16, "regenerate_every": 2, **DRAWN}
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, **options)
    trainer.train()
    assert len(decoded) == 2 * 16
    shares = [log["rollout/cached"] for log in trainer.state.log_history if "rollout/cached" in log]
    assert shares == ([0.0] * 4 + [1.0] * 4) * 2
    kept = parquet.read_table(trainer.source.cache.folder).to_pylist()
    first, second = ({tuple(r["prompt_ids"]): r["completion_ids"] for r in kept if r["draw"] == d} for d in (0, 1))
    assert len(kept) == 32 and first.keys() == second.keys()
    assert sum(first[prompt] != second[prompt] for prompt in first) > 8


@pytest.mark.parametrize("source", ["speculation", "generate", "server", "dataset"])
def test_a_run_killed_after_its_checkpoint_resumes_as_the_same_run(drafter_folder, model, tmp_path, serving, source):
    """Texts written between checkpoint and kill are on disk already, which must change nothing."""
    options = {
        "rollout_source": source,
        "server_url": serving.url if source == "server" else None,
        # States kept by speculation and states scored in replay differ in their last bits.
        "rejected_weight": 0.0 if source == "speculation" else 0.3,
        "lmbda": 0.5,
        "replay_buffer_size": 8,
        "replay_ratio": 0.5,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        **DRAWN,
    }
    texts = write(model, 0.8)
    whole = make_trainer(drafter_folder, model, texts, tmp_path / "whole", **options)
    whole.train()
    cut = make_trainer(drafter_folder, model, texts, tmp_path / "cut", callbacks=[StopAt(5)], **options)
    cut.train()
    resumed = make_trainer(drafter_folder, model, texts, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_same_weights(parameters_of(whole), parameters_of(resumed))


def test_a_servers_texts_train_as_the_data_sets(drafter_folder, model, tmp_path, serving, decoded):
    completions = {tuple(row["prompt_ids"]): serving.answer(row["prompt_ids"])[0] for row in write(model)}
    texts = Dataset.from_dict({"prompt_ids": list(completions), "completion_ids": list(completions.values())})
    options = {"max_steps": 8, **DRAWN}
    read = make_trainer(drafter_folder, model, texts, tmp_path / "read", **options)
    asked = make_trainer(
        drafter_folder, model, texts, tmp_path / "asked", rollout_source="server", server_url=serving.url, **options
    )
    for trainer in (read, asked):
        trainer.train()
    assert_same_weights(parameters_of(read), parameters_of(asked))
    assert decoded == [] and asked.state.log_history[0]["rollout/dropped"] == 0
    # Each seed is the draw's and the prompt's own.
    assert len({request["seed"] for request in serving.requests}) == 2 * 16


def test_texts_of_another_temperature_are_warned_of(drafter_folder, model, texts, tmp_path, caplog):
    def warnings_of(dataset, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make_trainer(drafter_folder, model, dataset, tmp_path, **options)
        return [record.message for record in caplog.records if "do not look like" in record.message]

    assert warnings_of(texts) == []
    (message,) = warnings_of(write(model, 1.5))
    assert "of their tokens are the target's greedy choice" in message and "of 16 texts" in message
    assert warnings_of(write(model, 1.5), num_texts_to_check=0) == []
    assert "of 3 texts" in warnings_of(write(model, 1.5), num_texts_to_check=3)[0]
