"""A server that writes the texts speculates with the drafter in training, and what it came to is logged."""

import sys

import pytest
import torch
from conftest import ANY_KIND, tiny_drafter, tiny_stopping_model, tiny_tokenizer
from engine_server import EngineServer
from runs import StopAt, make_trainer, spelled_prompts, written_texts

from draft_opd_trl import load_drafter
from draft_opd_trl.core.target import Target
from draft_opd_trl.texts import server
from draft_opd_trl.texts.server_source import SERVED
from draft_opd_trl.training.reloading import FOLDER


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server, "INTERVAL", 0.05)


class Reloading(EngineServer):
    """Loads the drafter that `note` names before it answers on, as a restart would, and counts the answers of each."""

    def __init__(self, note, *args, **options):
        super().__init__(*args, **options)
        self.note, self.loaded = note, []

    def complete(self, body):
        if self.note.exists():
            self.drafter = load_drafter(self.note.read_text()).bind(self.target)
            self.loaded.append((len(self.reports), [weight.clone() for weight in self.drafter.parameters()]))
            self.note.unlink()
        return super().complete(body)


@pytest.fixture
def world(tmp_path):
    """Target, drafter's folder, texts, and a server that speculates with the drafter from before training."""
    model = tiny_stopping_model(vocab_size=32)
    target = Target(model)
    tiny_drafter(ANY_KIND, target).save_pretrained(tmp_path / "drafter")
    script = tmp_path / "reload.py"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n")
    first = load_drafter(str(tmp_path / "drafter")).bind(target)
    with Reloading(tmp_path / "note", target, first, tiny_tokenizer()) as serving:
        yield model, str(tmp_path / "drafter"), written_texts(model, spelled_prompts(16), 0.0), serving, script


def trainer_of(world, tmp_path, command, **options):
    model, folder, texts, serving, script = world
    asked = {"rollout_source": "server", "server_url": serving.url, "max_steps": 4, "learning_rate": 0.05}
    reload = {"server_reload_command": command, "server_reload_steps": 2}
    return make_trainer(folder, model, texts, tmp_path / "run", **{**asked, **reload, **options})


def test_the_server_speculates_with_the_current_drafter(world, tmp_path):
    serving, script = world[3:]
    command = f"'{sys.executable}' '{script}' '{serving.note}'"
    trainer = trainer_of(world, tmp_path, command)
    begun = [weight.detach().clone() for weight in trainer.drafter.parameters()]
    trainer.train()
    [(answers, weights)] = serving.loaded  # after step 2 of 4; after the last there is nothing left to ask
    assert 0 < answers < len(serving.reports)
    assert any(not torch.equal(old, new) for old, new in zip(begun, weights, strict=True))
    saved = load_drafter(str(tmp_path / "run" / FOLDER))
    assert all(torch.equal(old, new) for old, new in zip(saved.parameters(), weights, strict=True))
    # What is logged is what the server counted, text by text.
    texts = serving.reports[1:]  # the first is asked to find out what the server takes
    expected = [
        sum(report.tokens - 1 for report in part) / sum(len(report.accepted[0]) for report in part)
        for part in (texts[first : first + 4] for first in range(0, 16, 4))
    ]
    logged = [log[SERVED] for log in trainer.state.log_history if SERVED in log]
    assert logged == pytest.approx(expected)
    assert trainer.last_served_length == pytest.approx(expected[-1])


def test_a_resumed_run_hands_its_drafter_over_first(world, tmp_path):
    serving, script = world[3:]
    command = f"'{sys.executable}' '{script}' '{serving.note}'"
    options = {"save_strategy": "steps", "save_steps": 1, "server_reload_steps": 100}
    trainer_of(world, tmp_path, command, callbacks=[StopAt(1)], **options).train()
    assert serving.loaded == []
    trainer_of(world, tmp_path, command, **options).train(resume_from_checkpoint=True)
    assert len(serving.loaded) == 1


def test_a_command_that_fails_ends_the_run_and_says_how_to_go_on(world, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import sys; sys.exit('no such unit')\n")
    trainer = trainer_of(world, tmp_path, f"'{sys.executable}' '{script}'")
    with pytest.raises(ValueError, match="ended with status 1: no such unit.*go on with resume_from_checkpoint=True"):
        trainer.train()
    assert trainer.state.global_step == 2
