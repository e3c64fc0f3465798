"""Evaluation by replay along a server's texts: asked once for all drafters, read before they count, and kept."""

import json

import pytest
from completions_server import CompletionsServer
from conftest import ANY_KIND, STOPS, save_target, tiny_drafter, tiny_stopping_model, tiny_tokenizer

from draft_opd_trl.commands.evaluate import EvaluateArguments, run, show
from draft_opd_trl.commands.options import QuantizationArguments
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


PROMPTS = ["a bad cab", "fed", "edge of a cafe", "beef"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("pair"), tiny_stopping_model()
    save_target(model, folder / "target")
    for seed in (1, 2):
        tiny_drafter(ANY_KIND, Target(model), seed=seed).save_pretrained(folder / f"drafter-{seed}")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return folder


def served(right=True):
    """A server of the target, or of another model."""
    target = Target(tiny_stopping_model(seed=0 if right else 5))

    def answer(prompt):
        ids = speculate(target, None, [prompt], SpeculationSettings(12, STOPS)).completions()[0]
        return ids, ids[-1] in STOPS

    return CompletionsServer(answer, tiny_tokenizer())


def measured(folder, **options):
    options = {"max_new_tokens": 12, "by": "replay", "compare": str(folder / "drafter-2"), **options}
    pair = {"model_name_or_path": str(folder / "drafter-1"), "teacher_model_name_or_path": str(folder / "target")}
    return run(EvaluateArguments([str(folder / "prompts.jsonl")], **pair, **options), QuantizationArguments())


def taus(result):
    return [one["acceptance_length"] for one in result["results"][0]["drafters"].values()]


def test_its_texts_give_the_counts_of_the_targets_own(folder, tmp_path):
    expected = measured(folder)
    with served() as server:
        found = measured(folder, server_url=server.url, output_dir=str(tmp_path))
        # Once for both drafters; and not again by a run that goes on.
        assert server.answered == len(PROMPTS)
        again = measured(folder, server_url=server.url, output_dir=str(tmp_path))
        assert server.answered == len(PROMPTS)
    assert taus(found) == taus(expected) == taus(again)
    assert found["results"][0]["server_texts"] == {"asked": len(PROMPTS), "dropped": 0}
    assert f"texts of the server: {len(PROMPTS)}, of which 0 were not the target's" in show(found)
    assert "server_texts" not in expected["results"][0]


def test_texts_of_another_model_are_written_anew(folder):
    expected = measured(folder)
    with served(right=False) as server:
        found = measured(folder, server_url=server.url)
    assert taus(found) == taus(expected)
    assert found["results"][0]["server_texts"]["dropped"] > 0


def test_results_along_other_texts_are_refused(folder, tmp_path):
    measured(folder, output_dir=str(tmp_path))
    with served() as server, pytest.raises(ValueError, match="texts was .*'of a server'"):
        measured(folder, server_url=server.url, output_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["model_name_or_path", "teacher_model_name_or_path"])
def test_a_server_of_texts_does_not_stand_for_the_pair(name):
    pair = {"model_name_or_path": "drafter", "teacher_model_name_or_path": "target", name: None}
    with pytest.raises(ValueError, match="is missing. Give it"):
        EvaluateArguments(["pocket"], **pair, by="replay", server_url="http://localhost:1")
