"""Evaluation by replay along a server's texts: asked once for all drafters, read before they count, and kept."""

import itertools
import json
import random

import pytest
import torch
from completions_server import CompletionsServer
from conftest import ANY_KIND, STOPS, save_target, tiny_drafter, tiny_stopping_model, tiny_tokenizer
from invariants import same_law_p

from draft_opd_trl.commands.evaluate import EvaluateArguments, run, show
from draft_opd_trl.commands.options import QuantizationArguments
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation.results import read_reports


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


def test_drawn_texts_of_a_server_give_speculations_law(folder, tmp_path):
    """Other draws than the target's here, so the accepted runs agree in law: over 250 prompts, asked at T = 0.7."""
    target, sampling, seeds = Target(tiny_stopping_model()), SamplingParams(0.7), itertools.count(1000)
    tiny_drafter(ANY_KIND, target).init_from_target(target).save_pretrained(tmp_path / "drafter")
    draw = random.Random(0)
    prompts = {"".join(draw.choices("abcdef", k=6)) for _ in range(250)}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in sorted(prompts)))

    def answer(prompt):
        drawn = speculate(target, None, [prompt], SpeculationSettings(6, STOPS, sampling), seeds=[next(seeds)])
        ids = drawn.completions()[0]
        return ids, ids[-1] in STOPS

    def runs(**options):
        output = tmp_path / options.get("by", "replay")
        pair = {"model_name_or_path": str(tmp_path / "drafter"), "teacher_model_name_or_path": str(folder / "target")}
        options |= {"temperature": [0.7], "max_new_tokens": 6, "output_dir": str(output), "batch_size": 50}
        run(EvaluateArguments([str(tmp_path / "prompts.jsonl")], **pair, **options), QuantizationArguments())
        (file,) = (file for file in output.glob("*.jsonl") if "plain" not in file.name)
        counts = [sum(report.accepted[0]) for report in read_reports(file).values()]
        assert len(counts) == len(prompts)
        return torch.bincount(torch.tensor(counts), minlength=6)

    with CompletionsServer(answer, tiny_tokenizer()) as server:
        along = runs(by="replay", server_url=server.url)
        assert server.answered >= len(prompts)
    decoded = runs(by="speculation", seed=5)
    assert along[1:].sum() > 25
    assert same_law_p(along, decoded) > 1e-3


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
