"""Quantised targets (bitsandbytes, CPU): they train drafters, stay lossless, and start new ones from true weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from conftest import KINDS, ROOT, STOPS, save_target, tiny_drafter, tiny_options, tiny_stopping_model
from datasets import Dataset
from ranks import run_case
from runs import spelled_prompts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from draft_opd_trl import SpeculationSettings, load_drafter, speculate
from draft_opd_trl.commands.options import QuantizationArguments
from draft_opd_trl.core.target import Target
from draft_opd_trl.drafters import create_drafter
from draft_opd_trl.training.loading import warn_about_quantization


pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

KINDS_OF_BITS = {
    "int8": QuantizationArguments(load_in_8bit=True),
    "nf4": QuantizationArguments(load_in_4bit=True, bnb_4bit_compute_dtype="float32"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target wide enough for 4-bit blocks, and drafters for it."""
    folder = tmp_path_factory.mktemp("quantized")
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.15}
    model = tiny_stopping_model(**shape)
    save_target(model, folder / "target")
    for kind in KINDS:
        tiny_drafter(kind, Target(model)).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module", params=sorted(KINDS_OF_BITS))
def target(request, folder):
    config = KINDS_OF_BITS[request.param].quantization_config()
    return Target(AutoModelForCausalLM.from_pretrained(folder / "target", quantization_config=config, dtype="float32"))


@pytest.fixture(scope="module")
def prompts():
    return spelled_prompts(8)


def test_layers_are_quantised_and_what_drafters_read_is_not(target, folder):
    full = Target(AutoModelForCausalLM.from_pretrained(folder / "target", dtype="float32"))
    assert target.quantized and not full.quantized
    assert not target.decoder.layers[0].mlp.up_proj.weight.is_floating_point()
    assert torch.equal(target.head.weight, full.head.weight)
    assert torch.equal(target.embedding.weight, full.embedding.weight)
    tokens = torch.arange(20)[None]
    quantized, exact = (one.logits(one.forward_text(tokens, ())[1]) for one in (target, full))
    assert not torch.equal(quantized, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_on_a_quantised_target_changes_no_text(target, folder, prompts, kind):
    drafter = load_drafter(str(folder / kind)).bind(target)
    plain = speculate(target, None, prompts, SpeculationSettings(20, STOPS, batch_size=1)).completions()
    assert speculate(target, drafter, prompts, SpeculationSettings(20, STOPS, batch_size=8)).completions() == plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_drafter_starts_from_the_weights_and_not_from_their_codes(target, folder, kind):
    full = Target(AutoModelForCausalLM.from_pretrained(folder / "target", dtype="float32"))
    options = tiny_options(kind, target)
    drafters = []
    for one in (target, full):
        torch.manual_seed(0)
        drafters.append(dict(create_drafter(kind, one, **options).named_parameters()))
    quantized, exact = drafters
    for name, value in exact.items():
        assert (quantized[name] - value).abs().max() <= 0.2 * value.abs().max(), name


def test_a_quantised_head_is_refused(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    model = AutoModelForCausalLM.from_pretrained(folder / "target", quantization_config=config, dtype="float32")
    with pytest.raises(ValueError, match=r"head is quantised \(Linear4bit\).*llm_int8_skip_modules"):
        Target(model)


WAYS = [("nf4", "adamw_torch"), ("int8", "paged_adamw_8bit")]


# Every kind one way, and every way for some kind.
@pytest.mark.parametrize(("kind", "bits", "optim"), [(kind, *WAYS[i % 2]) for i, kind in enumerate(KINDS)])
def test_training_on_a_quantised_target_resumes_to_the_very_same_run(
    folder, prompts, tmp_path, caplog, kind, bits, optim
):
    Dataset.from_dict({"prompt_ids": prompts}).to_json(tmp_path / "prompts.jsonl")
    case = {
        "drafter": str(folder / kind),
        "target": str(folder / "target"),
        "texts": str(tmp_path / "prompts.jsonl"),
        "quantization": vars(KINDS_OF_BITS[bits]),
        "options": {
            "rollout_source": "speculation",
            "rejected_weight": 0.5,
            "per_device_train_batch_size": 4,
            "optim": optim,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    }
    run_case(case, tmp_path / "whole")
    assert "Judge it against the target as it will be served" in caplog.text
    run_case({**case, "cut_at": 2}, tmp_path / "cut")
    start = dict(load_drafter(case["drafter"]).named_parameters())
    whole, cut = (dict(load_drafter(str(tmp_path / name)).named_parameters()) for name in ("whole", "cut"))
    for name, value in whole.items():
        assert not torch.equal(value, start[name]), name
        assert torch.equal(value, cut[name]), name


def test_outliers_over_the_batch_are_warned_of(folder, caplog):
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "target", quantization_config=config, dtype="float32")
    PartialState()  # the logger of accelerate asks it
    warn_about_quantization(Target(model))
    assert "llm_int8_threshold=6.0" in caplog.text


def test_evaluate_judges_on_the_precision_it_is_given(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--num_prompts", "2", "--max_new_tokens", "24"]
    command += ["--load_in_4bit", "--bnb_4bit_compute_dtype", "float32", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (drafter,) = json.loads(done.stdout)["results"][0]["drafters"].values()
    assert drafter["acceptance_length"] > 2 and drafter["texts"]["changed"] == 0
