"""EAGLE-3 by hand: the vocabulary map, taps, an uncached reference, and the training objective on eight tokens."""

import json

import pytest
import torch
from by_hand import attention, rms, rope
from conftest import VOCAB, random_prompts, tiny_drafter
from invariants import (
    assert_same_drafter,
    assert_same_weights,
    assert_saves_and_loads,
    assert_starts_from_the_targets_layers,
    every_anchor,
    sample_texts,
)
from torch.nn import functional

from draft_opd_trl.core.records import DraftBlocks, Rollout
from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.replay import text_blocks
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.drafters import create_drafter
from draft_opd_trl.drafters.eagle3 import LlamaForCausalLMEagle3
from draft_opd_trl.drafters.eagle3_config import Eagle3Config
from draft_opd_trl.folders.checkpoints import export_drafter


# What published checkpoints vary.
VARIANTS = {
    "plain": {},
    "norms": {"fc_norm": True, "norm_output": True},
    "before-residual": {"norm_before_residual": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "narrow": {"hidden_size": 16},
    "own-embeddings": {"own_embeddings": True},
    "full-vocabulary": {"draft_token_ids": None},
}


@pytest.fixture(params=VARIANTS)
def variant(request, qwen_target):
    return tiny_drafter("eagle3", qwen_target, **VARIANTS[request.param])


def test_the_vocabulary_map_by_hand(qwen_target):
    drafter = create_drafter("eagle3", qwen_target, draft_token_ids=[0, 2, 5])
    # target id = draft id + d2t: 0 + 0, 1 + 1, 2 + 3.
    assert drafter.d2t.tolist() == [0, 1, 3] and drafter.d2t.dtype == torch.int64
    assert drafter.t2d.tolist() == [index in (0, 2, 5) for index in range(VOCAB)] and drafter.t2d.dtype == torch.bool
    assert drafter.vocab_map.tolist() == [0, 2, 5]
    assert drafter.to_target_ids(torch.tensor([[2, 0], [1, 1]])).tolist() == [[5, 0], [2, 2]]
    assert drafter.linear_head.shape == (3, 32)
    # Created from the target, row i of the head is the target's row of the token it stands for.
    assert torch.equal(drafter.linear_head, qwen_target.head.weight[[0, 2, 5]])


def test_it_starts_from_the_targets_layers(target):
    assert_starts_from_the_targets_layers(target, "eagle3")


def test_a_whole_vocabulary_needs_no_map(qwen_target):
    drafter = create_drafter("eagle3", qwen_target)
    assert drafter.vocab_map is None and drafter.config.draft_vocab_size == VOCAB
    # vLLM refuses tables of a whole vocabulary.
    assert not {"d2t", "t2d"} & drafter.state_dict().keys()


def test_drawn_proposals_come_with_laws_over_the_targets_vocabulary(qwen_target):
    drafter = tiny_drafter("eagle3", qwen_target, draft_token_ids=[3, 9, 40])
    state = drafter.start(1, 8)
    choose = Chooser(SamplingParams(1.0))
    with torch.no_grad():
        proposal = drafter.propose(state, torch.tensor([[1, 2]]), torch.tensor([[1, 1]]), 4, choose)
    assert proposal.probs.shape == (1, 2, 4, VOCAB)
    torch.testing.assert_close(proposal.probs.sum(-1), torch.ones(1, 2, 4))
    assert (proposal.probs[..., [3, 9, 40]] > 0).all()
    assert set(proposal.tokens.flatten().tolist()) <= {3, 9, 40}


# -- taps ----------------------------------------------------------------------------------------------------------


def test_both_spellings_name_the_same_states(target):
    """On four layers: top level counts HF's `hidden_states`, eagle_config counts layers."""
    drafter = create_drafter("eagle3", target, target_layer_ids=[0, 1, 2])
    written = json.loads(drafter.config.to_json_string())
    assert written["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    tokens = torch.tensor([[4, 8, 15, 16, 23]])
    features, _ = target.forward_text(tokens, drafter.target_layer_ids)
    hidden_states = target.model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 5
    torch.testing.assert_close(features, torch.cat([hidden_states[index] for index in (1, 2, 3)], dim=-1))
    seen = []
    hooks = [
        target.decoder.layers[index].register_forward_hook(
            lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for index in (0, 1, 2)
    ]
    target.model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(features, torch.cat(seen, dim=-1))


def test_taps_in_any_spelling_are_read(tmp_path, qwen_target):
    base = Eagle3Config.from_target(qwen_target.config).to_dict()
    nested, top = base.pop("eagle_config"), base.pop("eagle_aux_hidden_state_layer_ids")
    assert (nested["eagle_aux_hidden_state_layer_ids"], top) == ([0, 1, 2], [1, 2, 3])
    for spelled in ({"eagle_config": nested}, {"eagle_aux_hidden_state_layer_ids": top}):
        assert Eagle3Config(**base, **spelled).target_layer_ids == [0, 1, 2]
    unsaid = LlamaForCausalLMEagle3(Eagle3Config(**base))
    assert unsaid.bind(qwen_target).target_layer_ids == [0, 1, 2]
    assert unsaid.config.to_dict()["eagle_config"] == nested
    with pytest.raises(ValueError, match=r"is \[1, 2, 3\] at the top level and \[1, 2, 3\] in eagle_config"):
        Eagle3Config(
            **base, eagle_config={"eagle_aux_hidden_state_layer_ids": top}, eagle_aux_hidden_state_layer_ids=top
        )


# -- an uncached reference from the weights alone --------------------------------------------------------------------


class Reference:
    """EAGLE-3's layer over explicit rows: each row is one pair, with its position and the rows it sees."""

    def __init__(self, drafter, target):
        self.config, self.weights = drafter.config, drafter.state_dict()
        self.eps, self.theta = self.config.rms_norm_eps, self.config.rope_parameters["rope_theta"]
        borrowed = target.model.get_input_embeddings().weight
        self.embeddings = self.weights.get("embed_tokens.weight", borrowed)
        self.offsets = self.weights.get("d2t", torch.zeros(VOCAB, dtype=torch.long))

    def linear(self, name, states):
        output = states @ self.weights[f"{name}.weight"].T
        return output + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else output

    def norm(self, name, states):
        return rms(states, self.weights[f"{name}.weight"], self.eps)

    def fuse(self, features):
        """`(T, 3 · H_target)` → `(T, H)`"""
        if self.config.fc_norm:
            parts = [self.norm(f"fc_norm.{i}", part) for i, part in enumerate(features.chunk(3, dim=-1))]
            features = torch.cat(parts, dim=-1)
        return self.linear("fc", features)

    def layer(self, hidden, tokens, positions, sees):
        """Hidden states `(R, H)`, tokens and positions `(R,)`, `sees` `(R, R)` → un-normed output `(R, H)`."""
        config, prefix = self.config, "midlayer.self_attn"
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        normed = self.norm("midlayer.hidden_norm", hidden)
        both = torch.cat([self.norm("midlayer.input_layernorm", self.embeddings[tokens]), normed], dim=-1)
        queries = rope(self.linear(f"{prefix}.q_proj", both).view(-1, heads, width), positions, self.theta)
        keys = rope(self.linear(f"{prefix}.k_proj", both).view(-1, kv_heads, width), positions, self.theta)
        values = self.linear(f"{prefix}.v_proj", both).view(-1, kv_heads, width)
        residual = normed if config.norm_before_residual else hidden
        hidden = residual + self.linear(f"{prefix}.o_proj", attention(queries, keys, values, sees))
        normed = self.norm("midlayer.post_attention_layernorm", hidden)
        gate = functional.silu(self.linear("midlayer.mlp.gate_proj", normed))
        return hidden + self.linear("midlayer.mlp.down_proj", gate * self.linear("midlayer.mlp.up_proj", normed))

    def fed_back(self, output):
        return self.norm("norm", output) if self.config.norm_output else output

    def logits(self, output):
        return self.norm("norm", output) @ self.weights["lm_head.weight"].T

    def chain(self, features, text, anchor, drafted=None):
        """
        One chain recomputed from nothing at every step: pairs of the text, then the chain's own, causally.

        Reads `drafted` where given, else its own argmax; returns logits `(K, DV)`.
        """
        hidden = self.fuse(features[:anchor])
        tokens = text[1 : anchor + 1].tolist()
        logits = []
        for slot in range(self.config.num_draft_tokens):
            count = len(tokens)
            output = self.layer(
                hidden, torch.tensor(tokens), torch.arange(count), torch.ones(count, count, dtype=torch.bool).tril()
            )
            logits.append(self.logits(output[-1]))
            hidden = torch.cat([hidden, self.fed_back(output[-1:])])
            own = int(logits[-1].argmax())
            tokens.append(int(own + self.offsets[own]) if drafted is None else int(drafted[slot]))
        return torch.stack(logits)


def _texts():
    return sample_texts(seed=8, longest=20)


def _blocks(rollout, num_draft_tokens, drafted=None):
    blocks = every_anchor(rollout, num_draft_tokens)
    if drafted is not None:
        blocks.draft_tokens = torch.randint(VOCAB, blocks.draft_tokens.shape, generator=drafted)
    return blocks


@torch.no_grad()
def test_drafting_with_gradients_equals_the_uncached_reference(qwen_target, variant):
    """Rejected slots are conditioned on the drafted tokens, whatever they are."""
    rollout, reference = _texts(), Reference(variant, qwen_target)
    features, _ = qwen_target.forward_text(rollout.tokens, variant.target_layer_ids)
    blocks = _blocks(rollout, variant.num_draft_tokens, torch.Generator().manual_seed(0))
    got = variant.logits(variant.draft(features, rollout.tokens, blocks))
    for index, (row, anchor) in enumerate(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)):
        expected = reference.chain(features[row], rollout.tokens[row], anchor, blocks.draft_tokens[index])
        torch.testing.assert_close(got[index], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cached_drafting_in_speculation_equals_the_uncached_reference(qwen_target, variant):
    """After ragged rounds of partial acceptance the state holds what a prefill of the text would leave."""
    rollout = speculate(qwen_target, variant, random_prompts(5, seed=3), SpeculationSettings(14, [], batch_size=3))
    features, _ = qwen_target.forward_text(rollout.tokens, variant.target_layer_ids)
    reference, blocks = Reference(variant, qwen_target), rollout.blocks
    for row, anchor, drafted in zip(blocks.texts.tolist(), blocks.anchors.tolist(), blocks.draft_tokens, strict=True):
        logits = reference.chain(features[row], rollout.tokens[row], anchor)
        assert torch.equal(variant.to_target_ids(logits.argmax(-1)), drafted)


@torch.no_grad()
def test_the_reference_on_every_family(target):
    drafter = tiny_drafter("eagle3", target)
    rollout, reference = _texts(), Reference(drafter, target)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _blocks(rollout, drafter.num_draft_tokens)
    got = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
    for index, (row, anchor) in enumerate(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)):
        expected = reference.chain(features[row], rollout.tokens[row], anchor, blocks.draft_tokens[index])
        torch.testing.assert_close(got[index], expected, rtol=1e-4, atol=1e-4)


# -- training ------------------------------------------------------------------------------------------------------

# Eight tokens x0 … x7, a prompt of three, four steps. Position t pairs the feature of t with the token at t + 1; row i
# is step i, column t a position; "-" is outside the text.
READS = ["1234567", "234567-", "34567--", "4567---"]
PREDICTS = ["234567-", "34567--", "4567---", "567----"]
ROTATED = ["0123456", "1234567", "2345678", "3456789"]
# The first completion token, x3, comes from the prefill, so the first anchor is 3: its chain starts at position 2.
SUPERVISED = ["0011110", "0011100", "0011000", "0010000"]
# What position 3 sees in its steps 0 … 3: step 0 of positions 0 … 3, and its own later steps.
SEES = ["1111000", "0001000", "0001000", "0001000"]


def _published_objective(reference, features, text):
    """Test-time training over all positions at once, by the tables: logits `(4, 7, DV)`."""
    hidden, steps, logits = reference.fuse(features[:7]), [], []
    for step in range(4):
        tokens = torch.tensor([int(text[int(place)]) if place != "-" else 0 for place in READS[step]])
        steps.append((hidden, tokens, torch.tensor([int(place) for place in ROTATED[step]])))
        rows = [torch.cat(part) for part in zip(*steps, strict=True)]
        sees = torch.zeros(7 * (step + 1), 7 * (step + 1), dtype=torch.bool)
        for position in range(7):
            for earlier in range(step + 1):
                for place in range(7):
                    seen = place <= position if earlier == 0 else place == position
                    if position == 3:
                        assert seen == (SEES[earlier][place] == "1")
                    sees[-7 + position, 7 * earlier + place] = seen
        # Only the last step's rows are read; earlier rows merely lend their keys.
        sees[:-7] |= torch.eye(7 * (step + 1), dtype=torch.bool)[:-7]
        output = reference.layer(*rows, sees)[-7:]
        logits.append(reference.logits(output))
        hidden = reference.fed_back(output)
    return torch.stack(logits)


def test_test_time_training_on_eight_tokens(qwen_target):
    drafter = tiny_drafter("eagle3", qwen_target)
    reference = Reference(drafter, qwen_target)
    rollout = Rollout.from_ids([[11, 3, 20]], [[5, 31, 8, 16, 2]])
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = text_blocks(rollout, torch.zeros(4, dtype=torch.long), torch.arange(3, 7), 4)
    logits = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
    expected = _published_objective(reference, features[0], rollout.tokens[0])
    supervised = 0
    for step in range(4):
        for position in range(7):
            block = position - 2  # anchor 3 starts at position 2
            ours = 0 <= block < 4 and step < int(blocks.num_valid[block])
            assert ours == (SUPERVISED[step][position] == "1")
            if not ours:
                continue
            supervised += 1
            place = int(PREDICTS[step][position])
            assert place == int(blocks.anchors[block]) + 1 + step
            assert int(blocks.draft_tokens[block, step]) == int(rollout.tokens[0, place])
            torch.testing.assert_close(logits[block, step], expected[step, position], rtol=1e-5, atol=1e-5)
    assert supervised == 4 + 3 + 2 + 1
    assert drafter.sft_decay == 0.8


def test_hidden_states_are_fed_back_with_gradients(qwen_target):
    """Slot 2's loss reaches slot 1's computation: through time, not only through the context."""
    drafter = tiny_drafter("eagle3", qwen_target)
    rollout = _texts()
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    block = DraftBlocks(*(torch.tensor(value) for value in ([0], [1], [[0] * 4], [0], [4])))
    first = []
    handle = drafter.midlayer.mlp.register_forward_hook(lambda module, inputs, output: first.append(output))
    states = drafter.draft(features, rollout.tokens, block)
    handle.remove()
    (gradient,) = torch.autograd.grad(states[0, 1].sum(), first[0])
    assert gradient.abs().max() > 0


def test_recomputed_chunks_change_nothing(qwen_target):
    results = []
    for size in (64, 3):
        drafter = tiny_drafter("eagle3", qwen_target)
        drafter.chains_per_chunk = size
        rollout = _texts()
        features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
        states = drafter.draft(features, rollout.tokens, _blocks(rollout, 4))
        states.square().sum().backward()
        results.append([states.detach(), *(p.grad for n, p in drafter.named_parameters() if n != "lm_head.weight")])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_chain_sees_the_whole_context_before_it_and_nothing_after(qwen_target):
    drafter = tiny_drafter("eagle3", qwen_target)
    rollout = Rollout.from_ids([[11, 3, 20]], [[5, 31, 8, 16, 2]])
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    block = DraftBlocks(*(torch.tensor(value) for value in ([0], [4], [[7, 8, 9, 10]], [0], [3])))
    before = drafter.draft(features, rollout.tokens, block)
    changed, tokens = features.clone(), rollout.tokens.clone()
    changed[:, 4:] += 5
    tokens[:, 5:] = 1
    torch.testing.assert_close(drafter.draft(changed, tokens, block), before)
    for place in range(4):
        nudged = features.clone()
        nudged[:, place] += 5
        assert not torch.allclose(drafter.draft(nudged, rollout.tokens, block), before, atol=1e-3), place
    # Slot k reads the drafted tokens before it: the last one is never read.
    for slot in range(4):
        other = DraftBlocks(
            block.texts, block.anchors, block.draft_tokens.clone(), block.num_accepted, block.num_valid
        )
        other.draft_tokens[0, slot] = 30
        same = [
            torch.allclose(new, old, atol=1e-5)
            for new, old in zip(drafter.draft(features, rollout.tokens, other)[0], before[0], strict=True)
        ]
        assert same == [later <= slot for later in range(4)]


def test_autocast_trains(qwen_target):
    drafter = tiny_drafter("eagle3", qwen_target)
    rollout = _texts()
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = _blocks(rollout, 4)
    exact = drafter.draft(features, rollout.tokens, blocks)
    with torch.autocast("cpu", torch.bfloat16):
        rough = drafter.draft(features, rollout.tokens, blocks)
    assert (rough - exact).norm() / exact.norm() < 0.05
    rough.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in drafter.named_parameters() if n != "lm_head.weight")


def test_embeddings_of_its_own_are_frozen_where_serving_lends_the_targets(qwen_target):
    narrow = tiny_drafter("eagle3", qwen_target, hidden_size=16)
    assert narrow.embed_tokens.weight.shape == (VOCAB, 16) and narrow.embed_tokens.weight.requires_grad
    copy = tiny_drafter("eagle3", qwen_target, own_embeddings=True)
    assert not copy.embed_tokens.weight.requires_grad
    assert "embed_tokens.weight" not in tiny_drafter("eagle3", qwen_target).state_dict()


# -- folders of every variant --------------------------------------------------------------------------------------


def test_every_variant_survives_saving_and_loading(variant, qwen_target, tmp_path):
    assert_saves_and_loads(qwen_target, variant, tmp_path)
    loaded, told = type(variant).from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(variant, loaded)
    assert not any(told.values())


def test_every_variant_survives_both_layouts(variant, qwen_target, target_folder, tmp_path):
    variant.save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    again = export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), "eagle3")
    assert_same_drafter(qwen_target, variant, again)
