"""Engines: which targets they serve with a kind, where that is not known, and the commands that start them."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import ANY_KIND, KINDS, tiny_drafter, tiny_model

from draft_opd_trl.commands import inspect as inspect_command
from draft_opd_trl.core.target import Target
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.folders.serving import (
    ENGINES,
    KNOWN_TARGETS,
    kinds_served,
    launch_commands,
    serves,
    serving_faults,
)


@pytest.fixture(scope="module", params=KINDS)
def drafter(request):
    return tiny_drafter(request.param, Target(tiny_model("qwen3")))


def test_what_an_engine_serves_is_what_the_kind_says_of_targets_that_were_looked_up(drafter, monkeypatch):
    served = {"SGLang": frozenset({"qwen3", "of_the_kind_alone"})}
    monkeypatch.setattr(type(drafter.config), "served_targets", served)
    assert serves("SGLang", drafter, "qwen3") is True
    assert serves("SGLang", drafter, "llama") is False
    assert serves("SGLang", drafter, "of_the_kind_alone") is None
    assert serves("vLLM", drafter, "qwen3") is None
    told = {engine: (words, served) for words, engine, served in serving_faults(drafter, "llama")}
    assert told["SGLang"][1] is False and f"SGLang {ENGINES['SGLang']} hands no hidden states" in told["SGLang"][0]
    assert told["vLLM"][1] is None and f"with a {drafter.kind} drafter is not known here" in told["vLLM"][0]
    assert serving_faults(drafter, "qwen3") == [(told["vLLM"][0].replace("llama", "qwen3"), "vLLM", None)]


def test_an_engine_that_refuses_says_what_it_serves_instead(drafter, monkeypatch):
    monkeypatch.setattr(type(drafter.config), "served_targets", {"SGLang": frozenset(), "vLLM": frozenset({"llama"})})
    others = kinds_served("SGLang", "llama")
    assert others and drafter.kind not in others and drafter.kind in kinds_served("vLLM", "llama")
    [(told, engine, _)] = serving_faults(drafter, "llama")
    assert engine == "SGLang" and told.endswith(f"with such a target it serves {', '.join(others)}")


def test_kinds_speak_of_engines_and_targets_that_are_known(drafter):
    served = drafter.config.served_targets
    assert set(served) <= set(ENGINES)
    assert [names - KNOWN_TARGETS for names in served.values()] == [frozenset()] * len(served)


def test_of_other_targets_it_is_said_that_nothing_is_known(make_folder, target_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    config = json.loads((Path(target_folder) / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    told = inspect_drafter(make_folder(ANY_KIND), str(other))
    assert told["loads"] == {"draft_opd_trl": True, "SGLang": None, "vLLM": None, "transformers": True}
    assert [fault["breaks"] for fault in told["faults"]] == [[], []]
    assert all("is not known here" in fault["fault"] for fault in told["faults"])
    assert "SGLang: not known" in inspect_command.show(told)


@pytest.mark.parametrize("name", ["a b", "it's", "$(touch x)", '"', "a;b", "a\nb", "`id`"])
def test_commands_are_quoted(name, drafter):
    commands = launch_commands(drafter, f"/{name}/target", f"/{name}/drafter")
    vllm = shlex.split(commands["vLLM"].replace(" \\\n", ""))
    assert vllm[2] == f"/{name}/target" and json.loads(vllm[4])["model"] == f"/{name}/drafter"
    sglang = shlex.split(commands["SGLang"].replace(" \\\n", ""))
    assert {f"/{name}/target", f"/{name}/drafter"} <= set(sglang)
