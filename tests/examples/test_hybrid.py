"""The hybrid of the pocket world: what it takes over, and the page that tells of its benchmark."""

import importlib
import json

import pytest
import torch
from conftest import POCKET, ROOT
from transformers import AutoModelForCausalLM


@pytest.fixture
def examples(monkeypatch):
    for folder in ("examples", "examples/benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_the_last_layer_is_the_pocket_targets(examples):
    target = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    hybrid = importlib.import_module("pocket.deltanet").hybrid_of(target)
    assert hybrid.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert torch.equal(hybrid.lm_head.weight, target.lm_head.weight)
    torch.manual_seed(0)
    states, places = torch.randn(2, 20, target.config.hidden_size), torch.arange(20)[None]
    ours, theirs = (
        model.model.layers[-1](states, position_embeddings=model.model.rotary_emb(states, where))
        for model, where in ((hybrid, places.expand(3, 1, -1)), (target, places))
    )
    torch.testing.assert_close(ours, theirs)


def test_the_page_has_the_table_of_the_results(examples):
    result = json.loads((ROOT / "docs" / "source" / "results" / "hybrid.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "source" / "benchmarks_gains.md").read_text(encoding="utf-8")
    assert importlib.import_module("hybrid").table(result) in page
