"""
Two kinds of drafters that do not ship, each in a few lines, at work in every room: what the contract is for.

One stands on the shared block backbone, with states of its own, a head that is no plain product, and a loss of its
own. The other is a small causal language model: no taps, its own embedding, head and cache. Each is its two classes
and a line in `DRAFTERS`; nothing else in the package or in these tests knows them.
"""

import pytest
import torch
from conftest import STOPS, random_prompts, tiny_drafter, tiny_model, tiny_tokenizer, train_drafter
from invariants import (
    assert_a_grid_proposes_what_single_anchors_do,
    assert_a_resumed_run_is_the_same_run,
    assert_draft_is_propose,
    assert_kept_states_are_those_of_packed_scoring,
    assert_lossless,
    assert_replay_has_the_law_of_speculation,
    assert_replay_is_speculation,
    assert_texts_follow_the_targets_law,
    generated,
)
from peft import LoraConfig
from runs import make_trainer, spelled_prompts, written_texts
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3Model

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.core.cache import PositionCache, cache_argument, visible
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.drafters.base import Drafter
from draft_opd_trl.drafters.block_backbone import BlockDrafter
from draft_opd_trl.drafters.drafter_config import DrafterConfig
from draft_opd_trl.drafters.parts import lay_out, plain_weight, shape_of
from draft_opd_trl.evaluation.traces import trace_texts
from draft_opd_trl.training.batching import BatchMaker
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.divergences import LossSettings, StreamLosses
from draft_opd_trl.training.losses import draft_loss
from draft_opd_trl.training.planning import plan_memory
from draft_opd_trl.training.streams import StreamSettings


# -- a head that reads the token before, on the shared backbone ----------------------------------------------------


class MarkovConfig(DrafterConfig, Qwen3Config):
    def __init__(self, block_size=5, mask_token_id=0, target_layer_ids=(1, 2), rank=4, **kwargs):
        super().__init__(**kwargs)
        self.block_size, self.mask_token_id, self.rank = block_size, mask_token_id, rank
        self.target_layer_ids, self.num_target_layers = list(target_layer_ids), None

    @classmethod
    def from_target(cls, target_config, num_hidden_layers=2, **overrides):
        cls.check_options(overrides)
        return cls(**{**shape_of(target_config), "num_hidden_layers": num_hidden_layers, **overrides})


class MarkovDrafter(BlockDrafter):
    """Logits are the target's head of h, and a bias of low rank by the token before the slot. States are [h; e]."""

    kind = "markov"
    config_class = MarkovConfig
    auxiliary_reads_target = True

    def __init__(self, config):
        super().__init__(config)
        self.previous = nn.Embedding(config.vocab_size, config.rank)
        self.bias = nn.Linear(config.rank, config.vocab_size, bias=False)
        self.confidence = nn.Linear(config.hidden_size + config.rank, 1)
        self.post_init()

    def _join(self, hidden, tokens):
        return torch.cat([hidden, self.previous(tokens).to(hidden.dtype)], dim=-1)

    def logits(self, states):
        hidden, previous = states.split([self.config.hidden_size, self.config.rank], dim=-1)
        head = self.target.head.weight
        return functional.linear(hidden.to(head.dtype), head) + self.bias(previous)

    def propose(self, state, tokens, anchors, limit, choose):
        hidden, steps = self.block_states(state.up_to(limit), tokens, anchors), []
        for slot in range(self.num_draft_tokens):
            steps.append(choose(self.logits(self._join(hidden[:, :, slot], tokens))))
            tokens = steps[-1][0]
        return self.join_steps(steps)

    def draft(self, features, tokens, blocks):
        first = tokens[blocks.texts, blocks.anchors][:, None]
        before = torch.cat([first, blocks.draft_tokens[:, :-1]], dim=1)
        return self._join(super().draft(features, tokens, blocks), before)

    def auxiliary_loss(self, states, draft_logps, target_logps):
        """The confidence head learns how likely a proposal drawn here is accepted."""
        accepted = torch.minimum(draft_logps, target_logps).exp().sum(-1).detach()
        told = self.confidence(states)[:, 0].float()
        loss = functional.binary_cross_entropy_with_logits(told, accepted, reduction="none")
        return {"loss": loss, "confidence": told.sigmoid()}


# -- a causal language model ---------------------------------------------------------------------------------------


class SmallLMConfig(DrafterConfig, Qwen3Config):
    served_targets = {"vLLM": frozenset({"qwen3"})}

    def __init__(self, chain_length=4, **kwargs):
        super().__init__(**kwargs)
        self.chain_length = chain_length

    @classmethod
    def from_target(cls, target_config, chain_length=4, num_hidden_layers=1, **overrides):
        cls.check_options(overrides)
        shape = {**shape_of(target_config), "num_hidden_layers": num_hidden_layers}
        return cls(chain_length=chain_length, **{**shape, **overrides})

    def to_dict(self):
        return {**super().to_dict(), "architectures": ["Qwen3ForCausalLM"]}

    @classmethod
    def layout(cls, written):
        return "a plain model of transformers"

    @classmethod
    def vllm_config(cls, kind, num_draft_tokens):
        return {"method": "draft_model", "num_speculative_tokens": num_draft_tokens}

    @classmethod
    def sglang_flags(cls, kind, num_draft_tokens):
        return ["--speculative-algorithm STANDALONE"]


class SmallLMDrafter(Drafter):
    """Reads the text itself, into a cache of its own. Its tensors are named as `Qwen3ForCausalLM` names them."""

    kind = "small_lm"
    config_class = SmallLMConfig
    auto_class = "AutoModelForCausalLM"
    code_travels = False
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def recognises(cls, config):
        return "chain_length" in config and config["architectures"] == ["Qwen3ForCausalLM"]

    @property
    def num_draft_tokens(self):
        return self.config.chain_length

    @property
    def linear_head(self):
        return plain_weight(self.lm_head)

    def check_target(self, target):
        mine, theirs = self.config.vocab_size, target.vocab_size
        self.refuse_misfit([f"vocab_size {mine} is not its {theirs}"] if mine != theirs else [], target)

    def logits(self, states):
        return self.lm_head(states)

    def _run(self, cache, tokens, positions, mask):
        cached = {cache_argument(self.model.forward): cache, "use_cache": True}
        return self.model(tokens, position_ids=positions, attention_mask=mask, **cached).last_hidden_state

    def start(self, batch_size, max_length):
        return PositionCache(self.config.num_hidden_layers, batch_size, max_length)

    def extend(self, state, features, positions, tokens, lanes=None):
        state.place(positions, state.max_length, lanes)
        mask = visible(positions, torch.arange(state.max_length, device=positions.device))
        self._run(state, tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1)), positions, mask)

    def _chains(self, state, tokens, anchors, limit):
        """States `(B, M, Q, H)` after each token of chains `(B, M, Q)` that go on from the texts before `anchors`."""
        size = tokens.shape[2]
        positions = (anchors[..., None] + torch.arange(size, device=anchors.device)).flatten(1)
        chains = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(size)
        text = torch.arange(limit, device=anchors.device) < anchors.repeat_interleave(size, dim=1)[..., None]
        own = visible(positions, positions)[:, 0] & (chains[:, None] == chains)
        state.place(positions, limit, keep=False)
        mask = torch.cat([text, own], dim=-1)[:, None]
        return self._run(state, tokens.flatten(1), positions, mask).unflatten(1, (-1, size))

    def propose(self, state, tokens, anchors, limit, choose):
        read, steps = tokens[..., None], []
        for _ in range(self.num_draft_tokens):
            steps.append(choose(self.logits(self._chains(state, read, anchors, limit)[:, :, -1])))
            read = torch.cat([read, steps[-1][0][..., None]], dim=-1)
        return self.join_steps(steps)

    def draft(self, features, tokens, blocks):
        state, grid = self.start(*tokens.shape), lay_out(blocks, tokens)
        self.extend(state, features, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), tokens)
        read = torch.cat([grid.tokens[..., None], grid.drafted[..., :-1]], dim=-1)
        return self._chains(state, read, grid.anchors, tokens.shape[1])[grid.cells]


TOYS = {toy.kind: toy for toy in (MarkovDrafter, SmallLMDrafter)}


@pytest.fixture(scope="module", params=TOYS)
def toy(request):
    """A kind that is registered while its tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DRAFTERS, request.param, TOYS[request.param])
        yield request.param


# -- drafting ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter(qwen_target, toy, prompts):
    # Sometimes right: a language model learns these texts by heart.
    steps = {"markov": 60, "small_lm": 12}[toy]
    return train_drafter(qwen_target, tiny_drafter(toy, qwen_target), prompts, steps=steps)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_speculation_is_lossless_and_replay_is_speculation(qwen_target, drafter, prompts, batch_size):
    stops = [generated(qwen_target, prompts[row], length)[-1] for row, length in ((0, 10), (2, 5))]
    rollout = assert_lossless(qwen_target, drafter, prompts, SpeculationSettings(30, stops, batch_size=batch_size))
    assert len(set(rollout.blocks.num_accepted.tolist())) >= 3, "the case must hold early and late errors"
    for num_chains in (1, 4):
        assert_replay_is_speculation(qwen_target, drafter, rollout, num_chains)


def test_drafting_with_gradients_is_proposing_and_packed_scoring_verifying(qwen_target, drafter):
    assert_draft_is_propose(qwen_target, drafter)
    assert_a_grid_proposes_what_single_anchors_do(qwen_target, drafter)
    assert_kept_states_are_those_of_packed_scoring(qwen_target, drafter, SamplingParams(1.0))


def test_every_parameter_gets_a_gradient_and_the_target_none(qwen_target, toy, prompts):
    drafter = tiny_drafter(toy, qwen_target)
    rollout = speculate(qwen_target, drafter, prompts, SpeculationSettings(20, []))
    for part, moves in ((slice(None), True), (slice(0), False)):
        drafter.zero_grad()
        loss = _loss(qwen_target, drafter, rollout, part)
        loss["loss"].backward()
        for name, parameter in drafter.named_parameters():
            assert parameter.grad is not None and (parameter.grad.abs().max() > 0) == moves, name
    assert qwen_target.head.weight.grad is None


def _loss(target, drafter, rollout, part=slice(None), **options):
    """Of a batch of replayed blocks; `part` are the blocks that are supervised."""
    make = BatchMaker(target, drafter, StreamSettings(rejected_weight=0.5), OnPolicySettings(), seed=0)
    (batch,), _ = make([rollout], step=0, lmbda=1.0, fresh=True)
    for weights in (batch.accepted_weights, batch.rejected_weights):
        kept = weights[part].clone()
        weights.zero_()
        weights[part] = kept
    losses = StreamLosses(LossSettings("ce", 0.0), LossSettings("reverse_kl", 1.0), **options)
    return draft_loss(drafter, target, batch, losses)


def test_the_loss_of_ones_own_is_the_same_in_chunks(qwen_target, toy, prompts):
    """Values, metrics and gradients, the heads' own included."""
    drafter = tiny_drafter(toy, qwen_target)
    rollout = speculate(qwen_target, drafter, prompts, SpeculationSettings(20, []))
    found = []
    for chunk_size in (10_000, 7):
        drafter.zero_grad()
        parts = _loss(qwen_target, drafter, rollout, chunk_size=chunk_size)
        parts["loss"].backward()
        found.append((parts, [parameter.grad.clone() for parameter in drafter.parameters()]))
    assert sorted(found[0][0]["auxiliary"]) == (["confidence", "loss"] if toy == MarkovDrafter.kind else [])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# -- the law at T > 0 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(toy):
    """Eight tokens: few enough to count texts."""
    target = Target(tiny_model("qwen3", vocab_size=8, seed=3, initializer_range=0.2))
    texts = [[3, 1], *random_prompts(5, vocab_size=8)]
    return target, train_drafter(target, tiny_drafter(toy, target), texts, steps=40)


def test_drawn_proposals_leave_the_law_alone_and_replay_has_theirs(small):
    assert_texts_follow_the_targets_law(*small, SamplingParams(1.3), sample_proposals=True)
    assert_replay_has_the_law_of_speculation(*small, SamplingParams(1.3))


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(model):
    return written_texts(model, spelled_prompts(16))


@pytest.mark.parametrize(
    "options",
    [
        {"lmbda": 0.0},
        {"rollout_source": "speculation", "rejected_weight": 0.5},
        {"rejected_weight": 0.5, "replay_buffer_size": 8, "replay_ratio": 1.0, "teacher_temperature": 1.0},
    ],
    ids=["sft", "draft-opd", "both-streams-replayed"],
)
def test_it_trains(model, toy, texts, tmp_path, options):
    before_target = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tiny_drafter(toy, Target(model)), model, texts, tmp_path, max_steps=3, **options)
    before = {name: value.detach().clone() for name, value in trainer.drafter.named_parameters()}
    trainer.train()
    assert [name for name, value in trainer.drafter.named_parameters() if torch.equal(before[name], value)] == []
    assert all(torch.equal(before_target[name], value) for name, value in model.state_dict().items())
    logs = [log for log in trainer.state.log_history if "loss/accepted" in log]
    own = {name for log in logs for name in log if name.startswith("auxiliary/")}
    assert own == ({"auxiliary/loss", "auxiliary/confidence"} if toy == MarkovDrafter.kind else set())
    for log in logs:
        assert log["loss"] == pytest.approx(log["loss/accepted"] + log.get("loss/rejected", 0))
        assert not own or 0 < log["auxiliary/confidence"] < 1 and 0 < log["auxiliary/loss"] < log["loss"]


def test_a_resumed_run_is_the_same_run(model, toy, texts, tmp_path):
    def build(output_dir, **options):
        return make_trainer(tiny_drafter(toy, Target(model)), model, texts, output_dir, **options)

    assert_a_resumed_run_is_the_same_run(build, tmp_path, 3)


def test_eight_at_once_are_two_times_four_in_every_figure(model, toy, texts, tmp_path):
    options = {"lmbda": 1.0, "rejected_weight": 0.5, "optim": "sgd", "max_steps": 2}
    logs = []
    for size, times in ((8, 1), (4, 2)):
        drafter = tiny_drafter(toy, Target(model))
        layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        trainer = make_trainer(drafter, model, texts, tmp_path, **layout, **options)
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss/accepted" in log])
    names = [name for name in logs[0][0] if name.startswith(("loss", "auxiliary/"))]
    for whole, halves in zip(*logs, strict=True):
        assert [whole[name] for name in names] == pytest.approx([halves[name] for name in names], rel=1e-3)


# Every module that a kind has of its own, its head among them.
ADAPTED = {"markov": ["previous", "bias", "fc"], "small_lm": ["embed_tokens", "lm_head", "q_proj"]}


def test_an_adapter_on_the_head_trains_what_is_drafted_with(model, toy, texts, tmp_path):
    drafter = tiny_drafter(toy, Target(model))
    config = LoraConfig(r=2, target_modules=ADAPTED[toy])
    options = {"peft_config": config, "rollout_source": "speculation", "rejected_weight": 0.5}
    trainer = make_trainer(drafter, model, texts, tmp_path, **options)
    trainable = {
        name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad
    }
    assert len(trainable) == 2 * len(ADAPTED[toy]) and trainer.drafter.linear_head is None
    trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert all("lora_" in name for name in moved) and sorted(moved) == sorted(trainable)
    after = dict(trainer.model.named_parameters())
    assert [name for name, value in trainable.items() if torch.equal(value, after[name])] == []


def test_an_adapter_past_which_a_drafter_reads_is_refused_by_name(model, texts, tmp_path):
    class Careless(MarkovDrafter):
        def logits(self, states):
            hidden, previous = states.split([self.config.hidden_size, self.config.rank], dim=-1)
            head = self.target.head.weight
            return functional.linear(hidden.to(head.dtype), head) + functional.linear(previous, self.bias.weight)

    target = Target(model)
    drafter = Careless(MarkovConfig.from_target(target.config)).bind(target)
    with pytest.raises(ValueError, match=r"'base_model.model.bias.lora_A.default.weight'.* would train nothing"):
        make_trainer(drafter, model, texts, tmp_path, peft_config=LoraConfig(r=2, target_modules=["bias", "fc"]))


# -- the plan and the trace ----------------------------------------------------------------------------------------


def test_it_is_planned(model, toy, tmp_path):
    drafter = tiny_drafter(toy, Target(model))
    for options in ({}, {"rejected_weight": 0.5, "rollout_source": "speculation", "eval_strategy": "steps"}):
        args = DraftOPDConfig(str(tmp_path), max_completion_length=12, report_to="none", **options)
        plan = plan_memory(model.config, drafter.config, args, prompt_length=8)
        assert plan.peak > sum(tensor.nbytes for part in (model, drafter) for tensor in part.parameters())


def test_it_is_traced(model, toy, texts):
    target = Target(model)
    drafter = tiny_drafter(toy, target).bind(target)
    rollout = speculate(target, drafter, texts["prompt_ids"][:4], SpeculationSettings(12, STOPS))
    traces = trace_texts(target, drafter, rollout, tiny_tokenizer())
    assert sum(len(trace.blocks) for trace in traces) == len(rollout.blocks)
    assert all(0 < share <= 1 for trace in traces for block in trace.blocks for share in block.draft_probs)


def test_what_does_not_fit_or_is_no_option_is_refused(qwen_target, toy):
    with pytest.raises(ValueError, match=f"This {toy} drafter does not fit the target .*vocab_size 40"):
        tiny_drafter(toy, qwen_target, vocab_size=40)
    with pytest.raises(TypeError, match="has no option 'xyzzy'"):
        tiny_drafter(toy, qwen_target, xyzzy=1)
