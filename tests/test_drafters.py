"""What every drafter kind must keep, over `DRAFTERS`; then DFlash's own format and an independent reference."""

import json

import pytest
import torch
from conftest import TINY, VOCAB, counting_target, draft_labels, random_prompts, tiny_drafter, tiny_model
from torch.nn import functional

from draft_opd_trl.drafters import DRAFTERS, DFlashConfig, DFlashDraftModel, create_drafter
from draft_opd_trl.drafters.dflash_config import default_layer_ids
from draft_opd_trl.records import DraftBlocks, Rollout
from draft_opd_trl.replay import read_text, text_blocks
from draft_opd_trl.sampling import Chooser
from draft_opd_trl.sampling_params import SamplingParams
from draft_opd_trl.target import Target


def _texts(seed=0, longest=30):
    return Rollout.from_ids(
        random_prompts(3, seed=seed), random_prompts(3, longest=longest, seed=seed + 1), pad_token_id=0
    )


def _every_anchor(rollout, num_draft_tokens):
    rows = [row for row, length in enumerate(rollout.lengths.tolist()) for _ in range(1, length)]
    anchors = [anchor for length in rollout.lengths.tolist() for anchor in range(1, length)]
    return text_blocks(rollout, torch.tensor(rows), torch.tensor(anchors), num_draft_tokens)


def _propose_one(drafter, features, rollout, row, anchor, choose=None):
    """Drafting as serving does it: a cached state read position by position up to the anchor, then one proposal."""
    state = drafter.start(1, rollout.tokens.shape[1] + drafter.num_draft_tokens)
    text = rollout.tokens[row : row + 1]
    for stop in range(anchor):
        positions = torch.tensor([[stop]])
        drafter.extend(state, features[row : row + 1, stop : stop + 1], positions, text[:, : anchor + 1])
    return drafter.propose(state, text[:, anchor : anchor + 1], torch.tensor([[anchor]]), anchor + 1, choose)


def test_replay_equals_cached_proposing_at_every_anchor(target, drafter):
    """Invariant 4, drafter part: values, not only tokens."""
    rollout = _texts()
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _every_anchor(rollout, drafter.num_draft_tokens)
    seen = []

    def choose(logits):
        seen.append(logits)
        return logits.argmax(-1), None

    with torch.no_grad():
        proposals = torch.cat(
            [
                _propose_one(drafter, features, rollout, row, anchor, choose).tokens[0]
                for row, anchor in zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)
            ]
        )
        blocks.draft_tokens = proposals
        logits = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
    assert len(blocks) > 30
    expected = torch.cat([part.reshape(-1, logits.shape[-1]) for part in seen]).view_as(logits)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(drafter.to_target_ids(logits.argmax(-1)), proposals)


def test_grid_proposals_equal_single_ones(target, drafter):
    rollout = _texts(seed=4)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    state = read_text(drafter, rollout, features)
    anchors = torch.stack([rollout.lengths - 1, torch.ones_like(rollout.lengths)], dim=1)
    with torch.no_grad():
        grid = drafter.propose(
            state, rollout.tokens.gather(1, anchors), anchors, rollout.tokens.shape[1], Chooser()
        ).tokens
        for row in range(3):
            for column in range(2):
                one = _propose_one(drafter, features, rollout, row, int(anchors[row, column]), Chooser()).tokens
                assert torch.equal(grid[row, column], one[0, 0])


def test_sampled_proposals_come_with_their_distributions(qwen_target, qwen_drafter):
    rollout = _texts()
    features, _ = qwen_target.forward_text(rollout.tokens, qwen_drafter.target_layer_ids)
    choose = Chooser(SamplingParams(1.0))
    with torch.no_grad():
        proposal = _propose_one(qwen_drafter, features, rollout, 0, 2, choose)
    assert proposal.probs.shape == (1, 1, qwen_drafter.num_draft_tokens, VOCAB)
    torch.testing.assert_close(proposal.probs.sum(-1), torch.ones(1, 1, qwen_drafter.num_draft_tokens))
    assert (proposal.probs.gather(-1, proposal.tokens[..., None]) > 0).all()


def test_every_parameter_gets_a_gradient(target, kind):
    drafter = tiny_drafter(kind, target)
    rollout = _texts()
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _every_anchor(rollout, drafter.num_draft_tokens)
    logits = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
    labels = draft_labels(drafter, blocks.draft_tokens)
    functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert target.head.weight.grad is None


def test_the_targets_weights_are_not_the_drafters(target, drafter):
    theirs = {parameter.data_ptr() for parameter in target.model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in drafter.parameters()}
    assert not theirs & {value.data_ptr() for value in drafter.state_dict().values()}


def test_unbound_drafter_says_so(kind, qwen_target):
    drafter = tiny_drafter(kind, qwen_target)
    unbound = type(drafter)(drafter.config)
    with pytest.raises(RuntimeError, match=r"call `drafter.bind\(target\)` first"):
        _ = unbound.target


def test_an_initialised_drafter_starts_from_the_target(target, kind):
    """The norms must scale as the target's do, whichever way the family stores them (Gemma keeps w of 1 + w)."""
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            assert "norm" not in name or torch.equal(parameter, parameter[:1].expand_as(parameter))
    drafter = create_drafter(kind, target, **TINY.get(kind, {}))
    scale = drafter.norm(torch.ones(target.hidden_size))
    torch.testing.assert_close(scale, target.decoder.norm(torch.ones(target.hidden_size)))
    assert scale.abs().min() > 0.5
    untouched = create_drafter(kind, target, init_from_target=False, **TINY.get(kind, {}))
    changed = [
        name
        for (name, mine), other in zip(drafter.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(mine, other)
    ]
    assert any("self_attn" in name for name in changed) and any("mlp" in name for name in changed)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"Unknown drafter kind 'medusa'; known kinds are \['dflash'"):
        create_drafter("medusa", counting_target())


# -- DFlash's format (FIELD section 3) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_target_layers", "num_draft_layers", "expected"),
    [(36, 5, [1, 9, 17, 25, 33]), (28, 5, [1, 7, 13, 19, 25]), (36, 1, [18]), (28, 1, [14])],
)
def test_default_layer_ids(num_target_layers, num_draft_layers, expected):
    assert default_layer_ids(num_target_layers, num_draft_layers) == expected


def test_config_has_the_published_layout(target):
    config = DFlashConfig.from_target(target.config, mask_token_id=47, block_size=8, num_hidden_layers=2)
    written = json.loads(config.to_json_string(use_diff=False))
    assert written["architectures"] == ["DFlashDraftModel"]
    assert written["model_type"] == "qwen3"
    assert written["block_size"] == 8
    assert written["num_target_layers"] == 4
    assert written["dflash_config"] == {"mask_token_id": 47, "target_layer_ids": [1, 1]}
    assert written["tie_word_embeddings"] is False
    assert written["layer_types"] == ["full_attention"] * 2
    rope = target.config.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    assert written["rope_theta"] == theta == written["rope_parameters"]["rope_theta"]


def test_config_round_trip(qwen_target, tmp_path):
    config = DFlashConfig.from_target(
        qwen_target.config, mask_token_id=47, block_size=7, num_hidden_layers=2, target_layer_ids=[0, 2]
    )
    config.rope_parameters["rope_theta"] = 12345.0
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 12345.0
    back = DFlashConfig.from_pretrained(tmp_path)
    assert back.target_layer_ids == [0, 2] and back.mask_token_id == 47 and back.block_size == 7
    assert back.rope_parameters["rope_theta"] == 12345.0
    assert {**back.to_dict(), "architectures": None} == {**config.to_dict(), "architectures": None}


def test_an_older_config_with_top_level_rope_theta_only(qwen_target, tmp_path):
    config = DFlashConfig.from_target(qwen_target.config, mask_token_id=47).to_dict()
    config.pop("rope_parameters")
    config["rope_theta"] = 777.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DFlashConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 777.0


def test_exact_key_set(qwen_target):
    drafter = tiny_drafter("dflash", qwen_target)
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    for layer in range(2):
        expected |= {f"layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"layers.{layer}.self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
        expected |= {f"layers.{layer}.self_attn.{name}_proj.weight" for name in "qkvo"}
        expected |= {f"layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert set(drafter.state_dict()) == expected
    assert drafter.state_dict()["fc.weight"].shape == (32, 2 * 32)


def test_sft_decay_is_the_published_recipe(qwen_target):
    # exp(−(k − 1) / 7) at block 16, 4 at blocks of 7 or 8.
    assert tiny_drafter("dflash", qwen_target, block_size=16).sft_decay == pytest.approx(0.8668779)
    assert tiny_drafter("dflash", qwen_target, block_size=8).sft_decay == pytest.approx(0.7788008)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "drafter hidden_size 16 is not the target's 32"),
        ({"vocab_size": 40}, "drafter vocab_size 40 is not the target's 48"),
        ({"num_target_layers": 6}, "drafter was made for 6 target layers, this one has 4"),
        ({"taps": [1, 3]}, r"target_layer_ids \[1, 3\] must name layers 0 … 2"),
        ({"taps": [-1, 1]}, r"target_layer_ids \[-1, 1\] must name layers 0 … 2"),
        ({"mask": 48}, "mask_token_id 48 is not a token of the target's vocabulary of 48"),
        ({"mask": None}, "mask_token_id None is not a token"),
        ({"block_size": 1}, "block_size 1 leaves no slot to propose"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(qwen_target, changes, message):
    config = DFlashConfig.from_target(qwen_target.config, mask_token_id=47, block_size=5, num_hidden_layers=1)
    config.dflash_config["target_layer_ids"] = changes.pop("taps", config.target_layer_ids)
    config.dflash_config["mask_token_id"] = changes.pop("mask", 47)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        DFlashDraftModel(config).bind(qwen_target)
    assert "Take the drafter made for this target, or make one with `create_drafter`" in str(caught.value)


def test_every_fault_is_named_at_once(qwen_target):
    config = DFlashConfig.from_target(qwen_target.config, mask_token_id=99, block_size=1, num_hidden_layers=1)
    with pytest.raises(ValueError, match="mask_token_id 99.*block_size 1"):
        DFlashDraftModel(config).bind(qwen_target)


@pytest.mark.parametrize(
    "overrides", [{"hidden_size": 16, "head_dim": 8}, {"vocab_size": 40}, {"target_layer_ids": [3]}]
)
def test_create_drafter_explains_what_does_not_fit(qwen_target, overrides):
    with pytest.raises(ValueError, match="does not fit the target"):
        create_drafter("dflash", qwen_target, mask_token_id=47, **{"num_hidden_layers": 1, **overrides})


def test_a_drafter_deeper_than_its_target_can_be_made(qwen_target):
    assert len(create_drafter("dflash", qwen_target, mask_token_id=47, num_hidden_layers=6).layers) == 6


# -- DFlash by an independent reference --------------------------------------------------------------------------


def _rms(states, weight, eps):
    return states / torch.sqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rope(states, positions, theta):
    """Rotary embedding on `(S, heads, D)`: halves (x1, x2) turned by position · theta^(−2i/D)."""
    half = states.shape[-1] // 2
    angles = positions[:, None].float() * theta ** (-torch.arange(half).float() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _slow_block(drafter, target, features, tokens, anchor):
    """One DFlash block from the weights alone: features `(T, F)`, tokens `(T,)` → states at slots 1 … K."""
    config, weights = drafter.config, drafter.state_dict()
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    context = _rms(features[:anchor] @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    ids = torch.tensor([int(tokens[anchor])] + [config.mask_token_id] * (config.block_size - 1))
    hidden = target.model.get_input_embeddings()(ids)
    own = torch.arange(anchor, anchor + config.block_size)
    everywhere = torch.arange(anchor + config.block_size)
    for layer in range(config.num_hidden_layers):

        def weight(name, layer=layer):
            return weights[f"layers.{layer}.{name}.weight"]

        normed = _rms(hidden, weight("input_layernorm"), eps)
        both = torch.cat([context, normed])
        queries = (normed @ weight("self_attn.q_proj").T).view(-1, heads, width)
        keys = (both @ weight("self_attn.k_proj").T).view(-1, kv_heads, width)
        values = (both @ weight("self_attn.v_proj").T).view(-1, kv_heads, width)
        queries = _rope(_rms(queries, weight("self_attn.q_norm"), eps), own, theta)
        keys = _rope(_rms(keys, weight("self_attn.k_norm"), eps), everywhere, theta)
        outputs = []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = queries[:, head] @ keys[:, shared].T / width**0.5
            outputs.append(scores.softmax(-1) @ values[:, shared])
        hidden = hidden + torch.cat(outputs, dim=-1) @ weight("self_attn.o_proj").T
        normed = _rms(hidden, weight("post_attention_layernorm"), eps)
        gate = functional.silu(normed @ weight("mlp.gate_proj").T) * (normed @ weight("mlp.up_proj").T)
        hidden = hidden + gate @ weight("mlp.down_proj").T
    return _rms(hidden, weights["norm.weight"], eps)[1:]


@torch.no_grad()
def test_dflash_equals_a_slow_reference_block_by_block(target):
    drafter = tiny_drafter("dflash", target)
    rollout = _texts(seed=8)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _every_anchor(rollout, drafter.num_draft_tokens)
    got = drafter.draft(features, rollout.tokens, blocks)
    for index, (row, anchor) in enumerate(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)):
        expected = _slow_block(drafter, target, features[row], rollout.tokens[row], anchor)
        torch.testing.assert_close(got[index], expected, rtol=1e-4, atol=1e-4)


def _replay_with_gradients(drafter, target):
    """States, gradients, and the bytes that the forward pass kept for the backward pass."""
    rollout, kept = _texts(seed=8), []
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _every_anchor(rollout, drafter.num_draft_tokens)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        states = drafter.draft(features, rollout.tokens, blocks)
    states.square().sum().backward()
    gradients = [value.grad for name, value in drafter.named_parameters() if name != "lm_head.weight"]
    return [states.detach(), *gradients], sum(kept)


def test_activation_checkpointing_keeps_no_activations_and_changes_no_gradient(qwen_target, kind):
    plain, kept = _replay_with_gradients(tiny_drafter(kind, qwen_target), qwen_target)
    drafter = tiny_drafter(kind, qwen_target)
    drafter.activation_checkpointing_enable()
    recomputed, kept_when_recomputed = _replay_with_gradients(drafter, qwen_target)
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)
    assert kept_when_recomputed < kept / 2


@torch.no_grad()
def test_packing_many_blocks_in_small_chunks_changes_nothing(qwen_target):
    drafter = tiny_drafter("dflash", qwen_target)
    rollout = _texts(seed=8)
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _every_anchor(rollout, drafter.num_draft_tokens)
    whole = drafter.draft(features, rollout.tokens, blocks)
    drafter.blocks_per_chunk = 3
    torch.testing.assert_close(drafter.draft(features, rollout.tokens, blocks), whole, rtol=1e-5, atol=1e-5)
    shuffled = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        drafter.draft(features, rollout.tokens, blocks.select(shuffled)), whole[shuffled], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_block_sees_neither_its_anchors_features_nor_the_future(qwen_target):
    drafter = tiny_drafter("dflash", qwen_target)
    rollout = _texts(seed=8)
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    block = DraftBlocks(*(torch.tensor(value) for value in ([0], [3], [[0] * 4], [0], [4])))
    before = drafter.draft(features, rollout.tokens, block)
    changed, tokens = features.clone(), rollout.tokens.clone()
    changed[:, 3:] += 5
    tokens[:, 4:] = 1
    torch.testing.assert_close(drafter.draft(changed, tokens, block), before)
    changed[:, 2] += 5
    assert not torch.allclose(drafter.draft(changed, tokens, block), before, atol=1e-3)


def test_registry_names_each_class_by_its_kind():
    for name, drafter_class in DRAFTERS.items():
        assert drafter_class.kind == name


def test_tied_target_lends_its_embedding_as_head():
    target = Target(tiny_model("qwen3", tie_word_embeddings=True))
    drafter = tiny_drafter("dflash", target)
    assert drafter.linear_head.data_ptr() == target.model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("option", "near"),
    [("num_layers", "'num_hidden_layers'"), ("block_sizes", "'block_size'"), ("atention_bias", "'attention_bias'")],
)
def test_a_misspelt_option_is_not_swallowed(qwen_target, option, near):
    with pytest.raises(TypeError, match=f"DFlashConfig has no option '{option}'. Did you mean {near}"):
        create_drafter("dflash", qwen_target, mask_token_id=3, **{option: 2})


def test_options_that_nothing_is_like(qwen_target, kind):
    with pytest.raises(
        TypeError, match="has no option 'xyzzy'. It takes .*target_layer_ids.*, and fields of the config"
    ):
        create_drafter(kind, qwen_target, **TINY[kind], xyzzy=2)
    # Fields of the config are options.
    create_drafter(kind, qwen_target, **TINY[kind], attention_bias=True, intermediate_size=40)
