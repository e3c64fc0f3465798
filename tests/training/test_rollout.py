"""The source of texts that a config names, and what makes a text another text."""

import pytest
import torch
from conftest import ANY_KIND, STOPS, tiny_drafter, tiny_model, tiny_tokenizer

from draft_opd_trl import DraftOPDConfig, SamplingParams, SpeculationSettings, Target
from draft_opd_trl.texts.server_source import ServerSource
from draft_opd_trl.texts.sources import DatasetSource
from draft_opd_trl.training.rollout import _faithful_text, build_source


TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def target():
    return Target(tiny_model("qwen3", vocab_size=32, seed=4))


def test_faithful_text():
    assert _faithful_text(TOKENIZER, [5, 6, 0, 2]) == "ab<|end|><|assistant|>"
    # A token no text gives: the tokenizer has 32.
    assert _faithful_text(TOKENIZER, [5, 40]) is None


def build(tmp_path, target, **options):
    settings = SpeculationSettings(20, STOPS, SamplingParams(options.get("temperature", 0.0)))
    args = DraftOPDConfig(str(tmp_path), report_to="none", **options)
    drafter = tiny_drafter(ANY_KIND, target)
    return build_source(args, target, drafter, TOKENIZER, settings, lambda name, value: None)


def test_each_name_builds_its_source(tmp_path, target):
    assert isinstance(build(tmp_path, target, rollout_source="dataset"), DatasetSource)
    assert not (tmp_path / "_text_cache").exists()
    assert build(tmp_path, target, rollout_source="speculation").source.drafter is not None
    assert build(tmp_path, target, rollout_source="generate").source.drafter is None
    source = build(tmp_path, target, rollout_source="server", server_url="http://nowhere", server_timeout=3)
    assert isinstance(source.source, ServerSource) and source.source.client.url == "http://nowhere/v1/completions"
    assert source.cache.folder.parent == tmp_path / "_text_cache"
    elsewhere = build(tmp_path, target, rollout_source="generate", text_cache_dir=str(tmp_path / "shared"))
    assert elsewhere.cache.folder.parent == tmp_path / "shared"


def test_what_decides_a_text_decides_the_folder(tmp_path, target):
    """Any source may write a text; another law, target, template or length makes it another text."""

    def folder(of=target, **options):
        return build(tmp_path, of, rollout_source="generate", **options).cache.folder

    same = folder()
    assert same == folder(seed=5) == folder(lmbda=0.0)
    assert same == build(tmp_path, target, rollout_source="speculation").cache.folder
    changed = torch.clone(target.model.lm_head.weight)
    others = [
        folder(of=Target(tiny_model("qwen3", vocab_size=32, seed=1))),
        folder(chat_template_kwargs={"enable_thinking": False}),
        folder(temperature=1.0),
        folder(temperature=1.0, seed=5),
        folder(temperature=1.0, top_k=5),
    ]
    with torch.no_grad():
        target.model.lm_head.weight += 1e-3
        others.append(folder())
        target.model.lm_head.weight.copy_(changed)
    assert folder() == same and len({same, *others}) == 7
