"""DSpark by an independent reference: its heads slot by slot, its slot layout, its loss, and starting from DFlash."""

import math

import pytest
import torch
from conftest import draft_labels, random_prompts, tiny_drafter, tiny_model, train_drafter
from invariants import (
    assert_a_grid_proposes_what_single_anchors_do,
    assert_draft_is_propose,
    assert_every_parameter_gets_a_gradient,
    assert_lossless,
    assert_replay_has_the_law_of_speculation,
    assert_replay_is_speculation,
    assert_saves_and_loads,
    assert_starts_from_the_targets_layers,
    assert_texts_follow_the_targets_law,
    every_anchor,
    sample_texts,
)
from peft import LoraConfig
from runs import make_trainer, spelled_prompts, written_texts
from torch.nn import functional

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.drafters import create_drafter
from draft_opd_trl.drafters.block_backbone import BlockDrafter
from draft_opd_trl.drafters.dspark_config import MARKOV_HEADS
from draft_opd_trl.folders import hub
from draft_opd_trl.folders.checkpoints import export_drafter


# Beside the one that all kinds' tests run on: the other heads, and the layout in which the anchor's slot is silent.
VARIANTS = {
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "no-confidence": {"enable_confidence_head": False},
    "anchor-silent": {"sample_from_anchor": False, "block_size": 5},
    "own-vocabulary": {"draft_token_ids": [token for token in range(48) if token % 10 != 7]},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    return request.param


# -- the model -----------------------------------------------------------------------------------------------------


def _slow_logits(drafter, target, hidden, before):
    """Logits of one block from the weights alone, slot by slot: states `(K, H)`, the tokens before `(K,)`."""
    weights = {name.removeprefix("markov_head."): value for name, value in drafter.state_dict().items()}
    rank, kind = drafter.config.markov_rank, drafter.config.markov_head_type
    memory, logits = torch.zeros(rank), []
    for state, token in zip(hidden, before.tolist(), strict=True):
        embedded = weights["markov_w1.weight"][token]
        if kind == "gated":
            inputs = torch.cat([state, embedded])
            gate = torch.sigmoid(weights["gate_proj.weight"] @ inputs + weights["gate_proj.bias"])
            embedded = gate * embedded
        if kind == "rnn":
            inputs = torch.cat([memory, embedded, state])
            joint = weights["joint_proj.weight"] @ inputs + weights["joint_proj.bias"]
            gate = torch.sigmoid(joint[:rank])
            memory = gate * memory + (1 - gate) * torch.tanh(joint[rank : 2 * rank])
            embedded = torch.tanh(joint[2 * rank :])
        logits.append(target.head.weight @ state + weights["markov_w2.weight"] @ embedded)
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("head_type", MARKOV_HEADS)
def test_it_equals_a_slow_reference_slot_by_slot(qwen_target, head_type):
    drafter = tiny_drafter("dspark", qwen_target, markov_head_type=head_type)
    rollout = sample_texts(seed=8)
    features, _ = qwen_target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = every_anchor(rollout, drafter.num_draft_tokens)
    got = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
    hidden = BlockDrafter.draft(drafter, features, rollout.tokens, blocks)
    for index, (text, anchor) in enumerate(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)):
        before = torch.cat([rollout.tokens[text, anchor : anchor + 1], blocks.draft_tokens[index, :-1]])
        expected = _slow_logits(drafter, qwen_target, hidden[index], before)
        torch.testing.assert_close(got[index], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_slot_proposes_the_anchors_too(qwen_target):
    """Four slots, four proposals: the backbone's states are those of the layout without the anchor, from slot 0 on."""
    drafter = tiny_drafter("dspark", qwen_target)
    silent = tiny_drafter("dspark", qwen_target, sample_from_anchor=False)
    assert (drafter.num_draft_tokens, silent.num_draft_tokens) == (4, 3)
    silent.load_state_dict(drafter.state_dict())
    features = torch.randn(1, 6, 64)
    context = drafter._context(features, torch.arange(6)[None])
    token, anchor = torch.tensor([[5]]), torch.tensor([[4]])
    states = drafter.block_states(context, token, anchor)
    torch.testing.assert_close(silent.block_states(context, token, anchor), states[:, :, 1:])


def test_the_variants_keep_the_invariants(qwen_target, prompts, variant, tmp_path):
    drafter = tiny_drafter("dspark", qwen_target, **variant)
    assert drafter.num_draft_tokens == 4
    assert_draft_is_propose(qwen_target, drafter)
    assert_a_grid_proposes_what_single_anchors_do(qwen_target, drafter)
    assert_every_parameter_gets_a_gradient(qwen_target, drafter)
    train_drafter(qwen_target, drafter, prompts, steps=40)
    rollout = assert_lossless(qwen_target, drafter, prompts, SpeculationSettings(24, [], batch_size=3))
    assert len(set(rollout.blocks.num_accepted.tolist())) >= 3
    assert_replay_is_speculation(qwen_target, drafter, rollout)
    assert_saves_and_loads(qwen_target, drafter, tmp_path)


@pytest.mark.parametrize("options", [{"markov_head_type": "rnn"}, {"draft_token_ids": [0, 1, 2, 3, 5, 6]}])
def test_a_head_of_its_own_draws_from_the_law_that_it_tells(options):
    target = Target(tiny_model("qwen3", vocab_size=8, seed=3, initializer_range=0.2))
    drafter = tiny_drafter("dspark", target, **options)
    train_drafter(target, drafter, [[3, 1], *random_prompts(5, vocab_size=8)], steps=40)
    assert_texts_follow_the_targets_law(target, drafter, SamplingParams(1.3), sample_proposals=True)
    assert_replay_has_the_law_of_speculation(target, drafter, SamplingParams(1.3))


def test_a_draft_vocabulary_is_headed_by_the_targets_rows(qwen_target):
    ids = [2, 3, 5, 47]
    for init in (True, False):
        options = {"mask_token_id": 1, "block_size": 4, "num_hidden_layers": 1, "init_from_target": init}
        drafter = create_drafter("dspark", qwen_target, draft_token_ids=ids, **options)
        assert torch.equal(drafter.lm_head.weight, qwen_target.head.weight[ids]) and drafter.vocab_map.tolist() == ids
        assert not drafter.lm_head.weight.requires_grad
    heads = drafter.markov_head
    assert (len(heads.markov_w1.weight), len(heads.markov_w2.weight)) == (48, 4)
    with pytest.raises(ValueError, match="draft_vocab_size=4 says how many tokens, not which"):
        tiny_drafter("dspark", qwen_target, draft_vocab_size=4)


def test_it_starts_from_the_targets_layers(target):
    assert_starts_from_the_targets_layers(target, "dspark")


# -- the loss of its own -------------------------------------------------------------------------------------------


def test_the_confidence_learns_how_likely_a_proposal_is_accepted(qwen_target):
    drafter = tiny_drafter("dspark", qwen_target)
    states = torch.randn(6, 32 + 6, requires_grad=True)
    draft_logps, target_logps = torch.randn(2, 6, 48, requires_grad=True).log_softmax(-1)
    told = drafter.auxiliary_loss(states, draft_logps, target_logps.detach())
    accepted = 1 - 0.5 * (draft_logps.exp() - target_logps.exp()).abs().sum(-1).detach()
    weight, bias = drafter.confidence_head.proj.weight[0], drafter.confidence_head.proj.bias
    confidence = torch.sigmoid(states @ weight + bias)
    expected = -accepted * confidence.log() - (1 - accepted) * (1 - confidence).log()
    torch.testing.assert_close(told["loss"], expected)
    torch.testing.assert_close(told["acceptance"], accepted)
    torch.testing.assert_close(told["confidence_bias"], (confidence - accepted).detach())
    torch.testing.assert_close(told["confidence_error"], (confidence - accepted).abs().detach())
    # Trained through the states, and its goal stands still.
    assert torch.autograd.grad(told["loss"].sum(), states)[0].abs().min() > 0
    assert not told["acceptance"].requires_grad
    assert drafter.auxiliary_loss(*(part[:0] for part in (states, draft_logps, target_logps)))["loss"].shape == (0,)


def test_without_the_head_there_is_no_loss(qwen_target):
    drafter = tiny_drafter("dspark", qwen_target, enable_confidence_head=False)
    assert drafter.auxiliary_loss is None and not drafter.auxiliary_reads_target


def test_sft_decay_is_the_published_recipe(qwen_target):
    assert tiny_drafter("dspark", qwen_target).sft_decay == pytest.approx(math.exp(-1 / 4))


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(model):
    return written_texts(model, spelled_prompts(16))


@pytest.mark.parametrize(
    "options",
    [{"lmbda": 0.0}, {"rollout_source": "speculation", "rejected_weight": 0.5}],
    ids=["sft", "draft-opd"],
)
def test_training_moves_every_parameter_and_logs_the_confidence(model, texts, tmp_path, options):
    drafter = tiny_drafter("dspark", Target(model), markov_head_type="rnn")
    trainer = make_trainer(drafter, model, texts, tmp_path, max_steps=2, **options)
    before = {name: value.detach().clone() for name, value in trainer.drafter.named_parameters()}
    trainer.train()
    assert [name for name, value in trainer.drafter.named_parameters() if torch.equal(before[name], value)] == []
    log = next(log for log in trainer.state.log_history if "loss/accepted" in log)
    assert 0 < log["auxiliary/acceptance"] < 1 and 0 < log["auxiliary/loss"] < log["loss"]
    assert abs(log["auxiliary/confidence_bias"]) <= log["auxiliary/confidence_error"] < 1


ADAPTERS = {
    "lora": {"target_modules": ["markov_w1", "markov_w2", "proj", "fc"]},
    "whole": {"target_modules": ["fc"], "modules_to_save": ["markov_w1", "markov_w2", "confidence_head"]},
}


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_saves_what_it_trained(model, texts, tmp_path, fields):
    """On both tables of the Markov head and on the confidence head; merged, the drafter proposes what training did."""
    target = Target(model)
    tiny_drafter("dspark", target).save_pretrained(tmp_path / "base")
    options = {"peft_config": LoraConfig(r=2, **fields), "rollout_source": "speculation", "learning_rate": 1e-2}
    trainer = make_trainer(str(tmp_path / "base"), model, texts, tmp_path / "run", **options)
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    trainer.train()
    # Two of each pair, or the module itself: the confidence head has a bias.
    assert len(trained) == (6 if "modules_to_save" in fields else 8)
    assert [name for name, value in trained.items() if torch.equal(value, before[name])] == []
    trainer.save_model(tmp_path / "adapter")
    whole = export_drafter(str(tmp_path / "adapter"), str(tmp_path / "whole"), "dspark")
    for name, value in hub.merged(trainer.model).state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value)


# -- from a drafter of another kind --------------------------------------------------------------------------------


def test_it_starts_where_a_drafter_on_its_backbone_stands(qwen_target, prompts):
    """Block for block what DFlash proposes, until the bias learns."""
    dflash = train_drafter(qwen_target, tiny_drafter("dflash", qwen_target), prompts, steps=60)
    dflash.config._name_or_path = "a folder that adapters of the new one must not name"
    drafter = create_drafter("dspark", qwen_target, from_drafter=dflash, markov_rank=6).eval()
    assert drafter.name_or_path == drafter.config._name_or_path == ""
    assert (drafter.num_draft_tokens, drafter.config.block_size, drafter.config.markov_rank) == (4, 5, 6)
    assert drafter.target_layer_ids == [1, 2] and drafter.config.architectures == ["Qwen3DSparkModel"]
    settings = SpeculationSettings(24, [], batch_size=4)
    ours, theirs = (speculate(qwen_target, one, prompts, settings) for one in (drafter, dflash))
    assert torch.equal(ours.blocks.draft_tokens, theirs.blocks.draft_tokens)
    assert len(set(ours.blocks.num_accepted.tolist())) >= 3
    assert not {value.data_ptr() for value in drafter.parameters()} & {
        value.data_ptr() for value in dflash.parameters()
    }
    features, _ = qwen_target.forward_text(ours.tokens, drafter.target_layer_ids)
    logits = drafter.logits(drafter.draft(features, ours.tokens, ours.blocks))
    labels = draft_labels(drafter, ours.blocks.draft_tokens)
    functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert drafter.markov_head.markov_w2.weight.grad.abs().max() > 0


def test_what_it_cannot_start_from(qwen_target):
    dflash = tiny_drafter("dflash", qwen_target)
    anchor = create_drafter("dspark", qwen_target, from_drafter=dflash, markov_rank=6, sample_from_anchor=True)
    assert anchor.num_draft_tokens == 5
    with pytest.raises(ValueError, match="the dflash drafter to start from are not this model's.*layers.2"):
        create_drafter("dspark", qwen_target, from_drafter=dflash, num_hidden_layers=3)
    with pytest.raises(ValueError, match="the dflash drafter to start from are not this model's.*'lm_head.weight'"):
        create_drafter("dspark", qwen_target, from_drafter=dflash, draft_token_ids=[1, 2])
    own = tiny_drafter("dspark", qwen_target, draft_token_ids=[1, 2])
    again = create_drafter("dspark", qwen_target, from_drafter=own)
    assert again.vocab_map.tolist() == [1, 2] and torch.equal(again.lm_head.weight, own.lm_head.weight)
    with pytest.raises(TypeError, match="no option 'markov_ranks'"):
        create_drafter("dspark", qwen_target, from_drafter=dflash, markov_ranks=3)
    for kind, source in (("dspark", "eagle3"), ("dflash", "dspark"), ("eagle3", "dflash")):
        with pytest.raises(ValueError, match=f"A {kind} drafter cannot start from one of kind {source}"):
            create_drafter(kind, qwen_target, from_drafter=tiny_drafter(source, qwen_target))
