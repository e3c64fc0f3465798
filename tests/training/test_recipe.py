"""Recipes, and that a value which was given wins by every road it can be given on, also where it equals a default."""

import copy
import dataclasses
import json
import pickle

import pytest
import yaml
from conftest import tiny_drafter, tiny_model
from runs import make_trainer, parameters_of, spelled_prompts, written_texts
from transformers import HfArgumentParser
from trl import TrlParser

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.cli import CommandParser
from draft_opd_trl.commands import train
from draft_opd_trl.core.target import Target
from draft_opd_trl.training.recipe import FOLDER, OfRecipe, read_recipe, recipe_names


# Each equals what stands without a recipe: our default, or that of transformers.
GIVEN = {"rejected_weight": 0.0, "per_device_train_batch_size": 8, "learning_rate": 3e-4, "num_train_epochs": 3.0}
# Of the paper, not given.
LEFT = {"accepted_loss": "bernoulli_forward_kl", "gradient_accumulation_steps": 10, "loss_max_clamp": 10.0}


def _paper(**settings):
    return DraftOPDConfig("out", report_to="none", recipe="paper", **settings)


def _words(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def _yaml(tmp_path, settings):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return ["--config", str(file)]


BASE = {"output_dir": "out", "report_to": "none", "recipe": "paper"}
PAIR = {"model_name_or_path": "d", "teacher_model_name_or_path": "t", "dataset_name": "p"}


def _ours(words):
    return CommandParser("train", train).parse([*words, *_words(PAIR)])[3]


def _trls(words):
    return TrlParser(DraftOPDConfig).parse_args_and_config(words)[0]


ROADS = {
    "constructor": lambda tmp_path: _paper(**GIVEN),
    "draft-opd": lambda tmp_path: _ours(_words(BASE | GIVEN)),
    "draft-opd --config": lambda tmp_path: _ours(_yaml(tmp_path, BASE | GIVEN)),
    "draft-opd, words over --config": lambda tmp_path: _ours(
        [*_yaml(tmp_path, BASE | dict.fromkeys(GIVEN, 5)), *_words(GIVEN)]
    ),
    "TrlParser": lambda tmp_path: _trls(_words(BASE | GIVEN)),
    "TrlParser --config": lambda tmp_path: _trls(_yaml(tmp_path, BASE | GIVEN)),
    "HfArgumentParser": lambda tmp_path: HfArgumentParser(DraftOPDConfig).parse_args_into_dataclasses(
        _words(BASE | GIVEN), look_for_args_file=False
    )[0],
    "HfArgumentParser, dict": lambda tmp_path: HfArgumentParser(DraftOPDConfig).parse_dict(BASE | GIVEN)[0],
    "HfArgumentParser, YAML": lambda tmp_path: HfArgumentParser(DraftOPDConfig).parse_yaml_file(
        _yaml(tmp_path, BASE | GIVEN)[1]
    )[0],
    "replace": lambda tmp_path: dataclasses.replace(_paper(), **GIVEN),
    "replace, afterwards": lambda tmp_path: dataclasses.replace(_paper(**GIVEN), seed=5),
    "copy": lambda tmp_path: copy.copy(_paper(**GIVEN)),
    "deepcopy": lambda tmp_path: copy.deepcopy(_paper(**GIVEN)),
    "pickle": lambda tmp_path: pickle.loads(pickle.dumps(_paper(**GIVEN))),
    "to_dict": lambda tmp_path: DraftOPDConfig(**_paper(**GIVEN).to_dict()),
    "JSON": lambda tmp_path: DraftOPDConfig(**json.loads(_paper(**GIVEN).to_json_string())),
    "a subclass": lambda tmp_path: dataclasses.dataclass(type("Own", (DraftOPDConfig,), {}))(**BASE, **GIVEN),
}


@pytest.mark.parametrize("road", ROADS)
def test_what_is_given_wins_and_the_recipe_fills_the_rest(road, tmp_path):
    config = ROADS[road](tmp_path)
    assert {name: getattr(config, name) for name in GIVEN | LEFT} == GIVEN | LEFT
    assert not [name for name, value in vars(config).items() if isinstance(value, OfRecipe)]


def test_nothing_is_a_value_too():
    config = _paper(loss_max_clamp=None, max_prompt_length=None)
    assert (config.loss_max_clamp, config.max_prompt_length, config.log_prob_min_clamp) == (None, None, -10.0)
    # Left to the teacher's temperature, which is soft.
    assert _paper(accepted_loss=None).accepted_loss == "forward_kl"


def test_what_transformers_turns_into_its_own_is_given_too():
    config = _paper(optim="adamw_torch_fused", lr_scheduler_type="linear", warmup_steps=0)
    assert (config.optim, config.lr_scheduler_type, config.warmup_steps) == ("adamw_torch_fused", "linear", 0)
    again = dataclasses.replace(config)
    assert (again.optim, again.lr_scheduler_type, again.warmup_steps) == ("adamw_torch_fused", "linear", 0)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        config = _paper(**{name: True})
        assert config.activation_checkpointing is True
        assert DraftOPDConfig(**config.to_dict()).activation_checkpointing is True


def test_without_a_recipe_all_is_as_the_default_one_has_it():
    config, recipe = DraftOPDConfig("out", report_to="none"), read_recipe("default")
    resolved = {"teacher_temperature": 0.0, "accepted_loss": "ce", "rejected_loss": "ce", "learning_rate": 2e-3}
    assert {name: getattr(config, name) for name in recipe} == {**recipe, **resolved}


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_set_what_can_tell_whether_it_was_given(name):
    known = {entry.name for entry in dataclasses.fields(DraftOPDConfig) if isinstance(entry.default, OfRecipe)}
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= known
    # Every field that a recipe may leave out has a value of the default recipe.
    assert known == set(read_recipe("default"))


def test_the_rate_follows_the_optimizer_and_the_temperature():
    def rate(**settings):
        return DraftOPDConfig("out", report_to="none", **settings).learning_rate

    assert [rate(), rate(temperature=0.7), rate(lmbda=0)] == [2e-3, 1e-3, 2e-3]
    assert [rate(optim="adamw_torch"), rate(recipe="paper"), rate(recipe="paper", temperature=1.0)] == [3e-4] * 3
    assert [rate(learning_rate=2e-3, temperature=1.0), rate(learning_rate=0, optim="sgd")] == [2e-3, 0]


def test_muon_is_a_name_like_those_of_transformers():
    config = DraftOPDConfig("out", report_to="none")
    for again in (dataclasses.replace(config), copy.deepcopy(config), DraftOPDConfig(**config.to_dict())):
        assert (config.optim, again.optim) == ("muon", "muon")
    with pytest.raises(ValueError, match="`optim` is 'muonn'; it must be one of muon, adamw.* Did you mean muon"):
        DraftOPDConfig("out", optim="muonn")
    with pytest.raises(ValueError, match="optim='muon' takes none. Leave it out, or choose another"):
        DraftOPDConfig("out", optim_args="momentum=0.9")


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(
        ValueError,
        match="`recipe` is 'papr'; it must be one of accepted_length, auf.* Did you mean paper",
    ):
        DraftOPDConfig("out", recipe="papr")
    with pytest.raises(TypeError, match="`recipe` is 3, of type int"):
        DraftOPDConfig("out", recipe=3)


def test_the_help_shows_what_the_default_recipe_sets(capsys):
    text = " ".join(CommandParser("train", train).format_help().split())
    assert "Weight of the rejected stream. (default: 0.0)" in text
    assert "Ceiling of a slot's loss. --" in text  # nothing to show
    assert "recipe.OfRecipe" not in text


# What two steps of a control train on: all slots of the text, or up to the drafter's own first wrong one.
CONTROLS = {"sft": False, "dpace": False, "lk": False, "accepted_length": False, "auf": True}
TEMPERATURES = {"dpace": 1.0, "lk": 1.0}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_trains(name, tmp_path):
    temperature = TEMPERATURES.get(name, 0.0)
    model = tiny_model("qwen3", vocab_size=32)
    texts = written_texts(model, spelled_prompts(8), temperature)
    trainer = make_trainer(
        tiny_drafter("dflash", Target(model)), model, texts, tmp_path, recipe=name, temperature=temperature
    )
    before, seen = parameters_of(trainer), []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda drafter, batch: seen.append(batch) or compute(drafter, batch)
    trainer.train()
    assert trainer.state.global_step == len(seen) == 2
    for batch in seen:
        blocks, taught = batch.blocks, (batch.accepted_weights > 0).sum(1)
        until = blocks.num_accepted + 1 if CONTROLS[name] else blocks.num_valid
        assert taught.tolist() == until.minimum(blocks.num_valid).tolist()
        assert blocks.has_error.any() == CONTROLS[name] and batch.draft_states is None
    assert all((before[key] != value).any() for key, value in parameters_of(trainer).items())
    # A step has no verification of whole texts to count.
    assert not any("acceptance/length" in log for log in trainer.state.log_history)
