"""The frozen target: taps, cached forwards, packed scoring against slow forwards, errors; its weights never change."""

from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, counting_target, scripted_target, tiny_model
from transformers import GenerationConfig, LlamaForCausalLM

from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.core.target import Target, stop_token_ids


TAPS = [0, 2]


def _tokens(rows=3, length=14, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_scripted_target_says_what_its_table_says():
    table = torch.arange(64.0).reshape(8, 8).sin()
    target = scripted_target(table)
    tokens = torch.tensor([[3, 0, 7, 7]])
    torch.testing.assert_close(target.model(input_ids=tokens).logits[0], table[tokens[0]])
    assert counting_target().model(input_ids=torch.tensor([[4, 11]])).logits.argmax(-1).tolist() == [[5, 0]]


def test_forward_text_taps_the_outputs_of_layers(target):
    tokens = _tokens()
    with torch.no_grad():
        output = target.model(input_ids=tokens, output_hidden_states=True)
    features, states = target.forward_text(tokens, TAPS)
    torch.testing.assert_close(features, torch.cat([output.hidden_states[1], output.hidden_states[3]], dim=-1))
    torch.testing.assert_close(states, output.hidden_states[-1])
    torch.testing.assert_close(target.logits(states), output.logits)


def test_embed_is_what_the_first_layer_reads(target):
    tokens = _tokens(1, 5)
    with torch.no_grad():
        output = target.model(input_ids=tokens, output_hidden_states=True)
    torch.testing.assert_close(target.embed(tokens), output.hidden_states[0])


def test_padding_is_harmless(target):
    tokens = _tokens(1, 8)
    padded = torch.cat([tokens, torch.zeros((1, 5), dtype=torch.long)], dim=1)
    torch.testing.assert_close(
        target.forward_text(padded, TAPS)[1][:, :8], target.forward_text(tokens, TAPS)[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_ragged_cached_forward_equals_the_whole_text(family, attention):
    target = Target(tiny_model(family, attn_implementation=attention))
    tokens = _tokens(3, 16)
    features, states = target.forward_text(tokens, TAPS)
    cache = target.new_cache(3, 20)
    done = torch.tensor([9, 2, 5])
    grid = torch.arange(9).expand(3, -1)
    # Rows get a common prefill, of which only `done` positions are right: the rest is to be overwritten.
    wrong = torch.where(grid < done[:, None], tokens[:, :9], (tokens[:, :9] + 7) % VOCAB)
    target.forward_cached(wrong, grid, cache, 9, TAPS)
    for _ in range(2):
        positions = done[:, None] + torch.arange(3)
        got = target.forward_cached(tokens.gather(1, positions), positions, cache, int(done.max()) + 3, TAPS)
        for mine, whole in zip(got, (features, states), strict=True):
            torch.testing.assert_close(mine, whole[torch.arange(3)[:, None], positions], rtol=1e-4, atol=1e-4)
        done = done + torch.tensor([3, 1, 2])


def test_cached_forward_of_some_rows_alone(target):
    tokens = _tokens(3, 8)
    _, states = target.forward_text(tokens, ())
    cache = target.new_cache(3, 8)
    positions = torch.arange(8).expand(2, -1)
    rows = torch.tensor([2, 0])
    _, got = target.forward_cached(tokens[rows], positions, cache, 8, (), rows)
    torch.testing.assert_close(got, states[rows], rtol=1e-4, atol=1e-4)


def _blocks(tokens):
    """Blocks with every kind of verdict: early and late errors, none, and a text that ends inside."""
    length = tokens.shape[1]
    draft = torch.randint(VOCAB, (7, 4), generator=torch.Generator().manual_seed(5))
    rows = torch.tensor([0, 0, 0, 1, 1, 2, 0])
    anchors = torch.tensor([0, 5, 6, 9, 3, length - 3, 8])
    accepted = torch.tensor([0, 2, 3, 1, 4, 0, 1])
    valid = torch.tensor([4, 4, 4, 4, 4, 2, 4])
    for row, (text, anchor, count) in enumerate(zip(rows, anchors, accepted, strict=True)):
        draft[row, :count] = tokens[text, anchor + 1 : anchor + 1 + count]
    return DraftBlocks(rows, anchors, draft, accepted, valid)


@torch.no_grad()
def _slow_scores(target, tokens, blocks):
    """One forward a block over text[: anchor + 1] + drafted prefix; zero where nothing need be scored."""
    states = torch.zeros(*blocks.draft_tokens.shape, target.hidden_size)
    for index, (row, anchor) in enumerate(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)):
        text = torch.cat([tokens[row, : anchor + 1], blocks.draft_tokens[index, :-1]])[None]
        hidden = target.decoder(input_ids=text, use_cache=False).last_hidden_state[0, anchor:]
        if blocks.has_error[index]:
            first = int(blocks.num_accepted[index]) + 1
            states[index, first:] = hidden[first:]
    return states


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_packed_scoring_equals_sequential_forwards(target, chunk_size):
    """Invariant 4, target part."""
    tokens = _tokens(3, 14)
    blocks = _blocks(tokens)
    cache = target.new_cache(3, 14)
    target.forward_text(tokens, (), cache)
    expected = _slow_scores(target, tokens, blocks)
    torch.testing.assert_close(target.score_blocks(tokens, blocks, cache, chunk_size), expected, rtol=1e-4, atol=1e-4)
    # By hand: an error at slot 1 leaves three slots to score, at slot 3 one, at slot 4 none; accepted blocks none.
    assert (expected.abs().sum(-1) > 0).sum(1).tolist() == [3, 1, 0, 2, 0, 3, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [2, 3])
def test_packed_scoring_with_a_window_shorter_than_a_block(window, attention):
    target = Target(tiny_model("gemma3", sliding_window=window, attn_implementation=attention))
    tokens = _tokens(3, 14)
    cache = target.new_cache(3, 14)
    target.forward_text(tokens, (), cache)
    expected = _slow_scores(target, tokens, _blocks(tokens))
    torch.testing.assert_close(target.score_blocks(tokens, _blocks(tokens), cache), expected, rtol=1e-4, atol=1e-4)


def test_scoring_no_blocks(target):
    cache = target.new_cache(1, 4)
    target.forward_text(_tokens(1, 4), (), cache)
    assert target.score_blocks(_tokens(1, 4), DraftBlocks.empty(3), cache).shape == (0, 3, target.hidden_size)


def test_nothing_changes_the_targets_weights():
    """Invariant 5, target part."""
    model = tiny_model("gemma3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = Target(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = _tokens(3, 14)
    cache = target.new_cache(3, 14)
    features, states = target.forward_text(tokens, TAPS, cache)
    assert not features.requires_grad and not states.requires_grad
    target.score_blocks(tokens, _blocks(tokens), cache)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_soft_cap_is_applied():
    target = Target(tiny_model("gemma3", final_logit_softcapping=2.0))
    raw = torch.tensor([0.0, 2.0, -100.0])
    torch.testing.assert_close(target.shape_logits(raw), torch.tensor([0.0, 2 * 0.7615942, -2.0]))
    assert target.logits(target.forward_text(_tokens(), ())[1]).abs().max() < 2


def test_the_head_is_linear_where_its_weight_alone_makes_the_logits(qwen_target):
    _, states = qwen_target.forward_text(_tokens(), ())
    torch.testing.assert_close(states @ qwen_target.linear_head.T, qwen_target.logits(states))


def test_a_soft_cap_or_a_bias_makes_a_head_more_than_its_weight():
    assert Target(tiny_model("gemma3", final_logit_softcapping=2.0)).linear_head is None
    model = tiny_model("qwen3")
    model.lm_head = torch.nn.Linear(*model.lm_head.weight.T.shape)
    assert Target(model).linear_head is None


def test_a_head_that_post_processes_is_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.25
            return output

    with pytest.raises(ValueError, match="Scaled post-processes its logits beyond a scale and a soft cap"):
        Target(Scaled(tiny_model("llama").config))


@pytest.mark.parametrize(
    ("configured", "eos", "expected"),
    [
        ([3, 5], None, [3, 5]),
        ([3, 5], 7, [3, 5, 7]),
        ([3, 5], 5, [3, 5]),
        (4, None, [4]),
        (0, 0, [0]),
        (None, 6, [6]),
    ],
)
def test_stop_tokens_come_from_generation_config_then_tokenizer(configured, eos, expected):
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=configured))
    assert stop_token_ids(model, SimpleNamespace(eos_token_id=eos)) == expected
    if eos is None:
        assert stop_token_ids(model) == expected


def test_no_stop_token_is_an_error():
    model = SimpleNamespace(generation_config=GenerationConfig())
    with pytest.raises(ValueError, match="No stop token.*Set generation_config.eos_token_id"):
        stop_token_ids(model, SimpleNamespace(eos_token_id=None))


def test_a_fingerprint_sees_the_config_too():
    plain, scaled = tiny_model("qwen3"), tiny_model("qwen3", rms_norm_eps=1e-3)
    assert Target(plain).fingerprint() == Target(tiny_model("qwen3")).fingerprint()
    assert Target(plain).fingerprint() != Target(scaled).fingerprint()
    assert Target(plain).fingerprint() != Target(plain.to(torch.bfloat16)).fingerprint()
