"""What the target writes alone, by its own model's decoding, is what speculation without a drafter writes."""

import pytest
from conftest import random_prompts, tiny_model
from transformers import GenerationConfig

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.plain import write_alone
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


PROMPTS = [*random_prompts(5, seed=3), *random_prompts(2, seed=3)]


def _settings(sampling):
    return SpeculationSettings(18, list(range(3, 12)), sampling, batch_size=2)


def _greedy(target):
    return dict(write_alone(target, PROMPTS, _settings(SamplingParams(0.0)), range(len(PROMPTS))))


@pytest.mark.parametrize("sampling", [SamplingParams(0.0), SamplingParams(0.8, top_k=20, top_p=0.9)])
def test_texts_are_those_of_speculation_without_a_drafter(target, sampling):
    """Draws included: they depend on the seed and the position."""
    expected = speculate(target, None, PROMPTS, _settings(sampling), seeds=range(len(PROMPTS)))
    got = dict(write_alone(target, PROMPTS, _settings(sampling), range(len(PROMPTS))))
    assert [got[index] for index in range(len(PROMPTS))] == expected.completions()


def test_the_models_own_generation_settings_change_nothing():
    model = tiny_model("qwen3")
    target = Target(model)
    expected = _greedy(target)
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=3.0, min_new_tokens=18, eos_token_id=4)
    model.generation_config = own
    assert _greedy(target) == expected
    assert model.generation_config is own
    assert any(len(text) < 18 for text in expected.values())


def test_where_texts_would_be_read_anew_speculation_leaves_them_to_the_model():
    target, told = Target(tiny_model("lfm2")), []
    rollout = speculate(
        target, None, PROMPTS, _settings(SamplingParams(0.0)), on_text=lambda index, *text: told.append((index, *text))
    )
    assert rollout.completions() == [text for _, text, _ in sorted(told)]
    assert all(runs == [0] * (len(text) - 1) for _, text, runs in told)
