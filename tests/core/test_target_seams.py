"""What is found out about a target by trying: where its states come from, and whether its cache takes tokens back."""

import pytest
import torch
from conftest import FAMILIES, RECURRENT, VOCAB, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

from draft_opd_trl.core.target import Target


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_that_the_config_does_not_tell_of_is_noticed(family, monkeypatch):
    """Tried out, as configs need not name their layers' types."""
    monkeypatch.setattr("draft_opd_trl.core.target_shape.TargetShape.no_cache_because", None)
    assert "its layers" in Target(tiny_model(family)).no_places


def test_a_model_that_reads_both_ways_is_refused():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    model = BertLMHeadModel(BertConfig(vocab_size=VOCAB, **shape, initializer_range=0.3))
    # What its head does beside a product is refused first.
    model.cls.predictions.transform = torch.nn.Identity()
    with pytest.raises(ValueError, match="BertLMHeadModel says something else of a token when others follow it"):
        Target(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="Qwen3Model has no head that says which token comes next. Give the whole"):
        Target(tiny_model("qwen3").model)


def test_layers_that_are_counted_otherwise_than_kept_are_refused():
    """As two for one (LongCat Flash), or with those that text alone skips (Mllama)."""
    model = tiny_model("qwen3")
    model.config.num_hidden_layers = 8
    with pytest.raises(ValueError, match="Qwen3ForCausalLM counts 8 layers, but keeps the states of 4: .*another"):
        Target(model)


@pytest.mark.parametrize("fault", [AttributeError("no such part"), TypeError("pixel_values are missing")])
def test_a_model_that_wants_more_than_tokens_is_refused(monkeypatch, fault):
    model = tiny_model("qwen3")

    def forward(**inputs):
        raise fault

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match=f"does not read two tokens alone .*{fault}.* Give the path of its folder"):
        Target(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_no_fault(family, dtype):
    assert Target(tiny_model(family).to(dtype)).no_places is None


@pytest.mark.parametrize(("family", "option"), [("cohere", "logit_scale"), ("granite", "logits_scaling")])
def test_a_scale_of_the_logits_is_theirs_too(family, option):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 2, "vocab_size": VOCAB, "initializer_range": 0.3, "pad_token_id": 0, option: 0.25}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    target, text = Target(model), torch.arange(9)[None]
    assert target.linear_head is None
    torch.testing.assert_close(target.logits(target.forward_text(text, ())[1]), model(text).logits)
