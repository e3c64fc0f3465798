"""
What every drafter must keep, as functions: general tests call them for each of `DRAFTERS`, a kind's own with its.

The numbers are those of DESIGN's invariants.
"""

import itertools

import torch
from conftest import (
    chi_square_p,
    draft_labels,
    random_prompts,
    tiny_options,
)
from runs import StopAt, figures_of, parameters_of
from torch.nn import functional

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.sampling import Chooser, probabilities
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.replay import Coupling, read_text, replay_text, text_blocks
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.drafters import create_drafter
from draft_opd_trl.folders.checkpoints import load_drafter


# -- texts and blocks to check on ----------------------------------------------------------------------------------


# What rounding may cost, by the target's dtype: relative and absolute.
ROUNDING = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (5e-2, 5e-1)}


def assert_close(target, got, expected):
    """Equal to rounding in the target's dtype."""
    rtol, atol = ROUNDING[target.dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=rtol, atol=atol)


def sample_texts(seed=0, longest=30, device="cpu"):
    """Three ragged texts that no model wrote."""
    prompts, completions = random_prompts(3, seed=seed), random_prompts(3, longest=longest, seed=seed + 1)
    return Rollout.from_ids(prompts, completions, device=device)


def every_anchor(rollout, num_draft_tokens):
    """A block of the text itself at each position of each text, the prompt's too, but for its first."""
    places = [(text, anchor) for text, length in enumerate(rollout.lengths.tolist()) for anchor in range(1, length)]
    texts, anchors = torch.tensor(places, device=rollout.tokens.device).T
    return text_blocks(rollout, texts, anchors, num_draft_tokens)


def generated(target, prompt, max_new_tokens, stops=(), **options):
    """What transformers' own greedy decoding writes."""
    ids = torch.tensor([prompt], device=target.device)
    output = target.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        **options,
    )
    return output[0, len(prompt) :].tolist()


def assert_same_blocks(got, expected):
    for name in ("texts", "anchors", "draft_tokens", "num_accepted", "num_valid"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def assert_same_weights(one, other):
    """Of two models, or of two tables of tensors: every one, bit for bit."""
    one, other = (model if isinstance(model, dict) else model.state_dict() for model in (one, other))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# -- 1: greedy speculation writes the target's text -----------------------------------------------------------------


def assert_lossless(target, drafter, prompts, settings):
    """Token for token, at temperature 0. Returns the texts."""
    rollout = speculate(target, drafter, prompts, settings)
    limit, stops = settings.max_new_tokens, settings.stop_token_ids
    assert rollout.completions() == [generated(target, prompt, limit, stops) for prompt in prompts]
    return rollout


# -- 2: drawn texts and drawn proposals have the right law ----------------------------------------------------------


def same_law_p(first, second):
    """p-value of two histograms coming from one law; cells that hold fewer than 10 together are merged into one."""
    counts = torch.stack([torch.as_tensor(some).double().flatten().cpu() for some in (first, second)])
    small = counts.sum(0) < 10
    counts = torch.cat([counts[:, ~small], counts[:, small].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(max(counts.shape[1] - 1, 1), dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


@torch.no_grad()
def continuation_law(target, prompt, length, sampling):
    """Probability of each continuation of `length` tokens, by running the target on every one: `(V,) * length`."""
    size = target.vocab_size
    law = torch.ones((), device=target.device)
    for depth in range(length):
        grid = torch.tensor(list(itertools.product(range(size), repeat=depth)), dtype=torch.long)
        grid = grid.reshape(size**depth, depth)
        texts = torch.cat([torch.tensor(prompt).expand(len(grid), -1), grid], dim=1).to(target.device)
        step = probabilities(target.model(input_ids=texts).logits[:, -1], sampling)
        law = (law.reshape(-1, 1) * step).reshape((size,) * (depth + 1))
    return law


def assert_texts_follow_the_targets_law(target, drafter, sampling, sample_proposals):
    """Three tokens after a prompt, counted; the target has eight tokens. A law that is a little off must be seen."""
    count, prompt = 3000, [3, 1]
    settings = SpeculationSettings(4, [], sampling, sample_proposals, batch_size=1000)
    rollout = speculate(target, drafter, [prompt] * count, settings, torch.Generator().manual_seed(0))
    cells = (rollout.tokens[:, 2:5].cpu() * torch.tensor([64, 8, 1])).sum(1)
    law = continuation_law(target, prompt, 3, sampling).cpu()
    torch.testing.assert_close(law.sum(), torch.ones(()))
    counts = torch.bincount(cells, minlength=512)
    assert chi_square_p(counts, law) > 1e-4
    other = SamplingParams(sampling.temperature * 1.5, sampling.top_k, sampling.top_p)
    assert chi_square_p(counts, continuation_law(target, prompt, 3, other).cpu()) < 1e-6
    accepted = rollout.blocks.num_accepted
    assert 0.02 < (accepted > 0).float().mean() < 0.98, "the case must hold accepted and rejected proposals"


def coupling_of(target, states, sampling, num_draft_tokens, seed=0):
    shape = (*states.shape[:2], num_draft_tokens, 2)
    uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(states.device)
    return Coupling(target, states, sampling, uniforms)


def replayed(target, drafter, rollout, sampling, num_chains=2):
    """Given texts, what verification of drawn proposals would have said of them."""
    features, states = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    coupling = coupling_of(target, states, sampling, drafter.num_draft_tokens)
    return replay_text(drafter, rollout, features, num_chains, coupling)


def block_histograms(blocks):
    """How often each first block, and each second anchor with its first proposal, came up. Of eight tokens."""
    first = blocks.anchors == 2
    draft, accepted = blocks.draft_tokens, blocks.num_accepted.clamp(max=4)
    blocks_seen = (draft[first, 0] * 8 + draft[first, 1]) * 5 + accepted[first]
    later = (blocks.anchors[~first] * 8 + draft[~first, 0]) * 5 + accepted[~first]
    return torch.bincount(blocks_seen, minlength=320), torch.bincount(later, minlength=400)


def speculated_histograms(target, drafter, sampling):
    """Of texts of five tokens: what speculation with drawn proposals exposed, and as many texts the target wrote."""
    prompts = [[3, 1]] * 4000
    settings = SpeculationSettings(5, [], sampling, sample_proposals=True, batch_size=1000)
    speculated = speculate(target, drafter, prompts, settings, torch.Generator().manual_seed(0))
    plain = speculate(target, None, prompts, settings, torch.Generator().manual_seed(1))
    assert 0.02 < (speculated.blocks.num_accepted > 0).float().mean() < 0.98
    return block_histograms(speculated.blocks), plain


def replayed_law_p(target, drafter, sampling, expected, texts):
    """The smallest p-value of the replayed blocks' having the law of speculation's."""
    ours = block_histograms(replayed(target, drafter, texts, sampling))
    return min(same_law_p(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


def assert_replay_has_the_law_of_speculation(target, drafter, sampling):
    assert replayed_law_p(target, drafter, sampling, *speculated_histograms(target, drafter, sampling)) > 1e-4


# -- 3: replay says what speculation said ---------------------------------------------------------------------------


def assert_replay_is_speculation(target, drafter, rollout, num_chains=4):
    """Same anchors, proposals, accepted counts; of texts that speculation wrote with argmax proposals."""
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    assert_same_blocks(replay_text(drafter, rollout, features, num_chains), rollout.blocks)
    # Where only the verdict is wanted, proposals behind the first rejected one may be missing, and nothing else.
    judged = replay_text(drafter, rollout, features, num_chains, judge_only=True)
    missing = judged.draft_tokens < 0
    slots = torch.arange(drafter.num_draft_tokens, device=missing.device)
    decided = torch.minimum(judged.num_accepted + 1, judged.num_valid)[:, None]
    assert not (missing & (slots < decided)).any()
    judged.draft_tokens = torch.where(missing, rollout.blocks.draft_tokens, judged.draft_tokens)
    assert_same_blocks(judged, rollout.blocks)


# -- 4: the paths of drafting and of scoring agree ------------------------------------------------------------------


def propose_one(drafter, features, rollout, text, anchor, choose):
    """Drafting as serving does it: a cached state read position by position up to the anchor, then one proposal."""
    state = drafter.start(1, rollout.tokens.shape[1] + drafter.num_draft_tokens)
    tokens = rollout.tokens[text : text + 1]
    for position in range(anchor):
        step = torch.tensor([[position]], device=tokens.device)
        drafter.extend(state, features[text : text + 1, position : position + 1], step, tokens[:, : anchor + 1])
    anchors = torch.tensor([[anchor]], device=tokens.device)
    return drafter.propose(state, tokens[:, anchor : anchor + 1], anchors, anchor + 1, choose)


@torch.no_grad()
def assert_draft_is_propose(target, drafter):
    """The path with gradients against the cached one, at every anchor: logits, not only tokens."""
    rollout = sample_texts(device=target.device)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = every_anchor(rollout, drafter.num_draft_tokens)
    seen = []

    class Seeing(Chooser):
        def __call__(self, logits):
            seen.append(logits)
            return super().__call__(logits)

    places = list(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True))
    assert len(places) > 30
    blocks.draft_tokens = torch.cat(
        [propose_one(drafter, features, rollout, text, anchor, Seeing()).tokens[0] for text, anchor in places]
    )
    logits = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
    expected = torch.cat([part.reshape(-1, logits.shape[-1]) for part in seen]).view_as(logits)
    assert_close(target, logits, expected)
    if target.dtype == torch.float32:  # else two tokens often share the largest logit
        assert torch.equal(drafter.to_target_ids(logits.argmax(-1)), blocks.draft_tokens)


@torch.no_grad()
def assert_a_grid_proposes_what_single_anchors_do(target, drafter):
    rollout = sample_texts(seed=4, device=target.device)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    state = read_text(drafter, rollout, features)
    anchors = torch.stack([rollout.lengths - 1, torch.ones_like(rollout.lengths)], dim=1)
    tokens = rollout.tokens.gather(1, anchors)
    grid = drafter.propose(state, tokens, anchors, rollout.tokens.shape[1], Chooser()).tokens
    for text in range(3):
        for column in range(2):
            one = propose_one(drafter, features, rollout, text, int(anchors[text, column]), Chooser()).tokens
            assert torch.equal(grid[text, column], one[0, 0])


def assert_kept_states_are_those_of_packed_scoring(target, drafter, sampling):
    """What speculation kept of its verifications, against blocks packed behind their texts."""
    settings = SpeculationSettings(24, [], sampling, batch_size=3, keep_states=True)
    prompts = random_prompts(10, seed=21)
    rollout = speculate(target, drafter, prompts, settings, torch.Generator().manual_seed(0))
    cache = target.new_cache(*rollout.tokens.shape)
    _, states = target.forward_text(rollout.tokens, (), cache)
    blocks = rollout.blocks
    scored = target.score_blocks(rollout.tokens, blocks, cache)
    slots = torch.arange(blocks.num_draft_tokens, device=target.device)
    off_text = (slots > blocks.num_accepted[:, None]) & blocks.has_error[:, None]
    assert off_text.sum() > 50
    assert_close(target, rollout.block_states[off_text], scored[off_text])
    on_text = (slots <= blocks.num_accepted[:, None]) & (slots < blocks.num_valid[:, None])
    before = (blocks.anchors[:, None] + slots).clamp(max=rollout.tokens.shape[1] - 1)
    given_text = states[blocks.texts[:, None], before]
    assert_close(target, rollout.block_states[on_text], given_text[on_text])


# -- 5: who learns --------------------------------------------------------------------------------------------------


# What the engines take from the target, so that training must leave it alone.
FROZEN = {"lm_head.weight"}


def assert_every_parameter_gets_a_gradient(target, drafter):
    rollout = sample_texts(device=target.device)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    blocks = every_anchor(rollout, drafter.num_draft_tokens)
    states = drafter.draft(features, rollout.tokens, blocks).flatten(0, 1)
    logits = drafter.logits(states)
    loss = functional.cross_entropy(logits, draft_labels(drafter, blocks.draft_tokens).flatten())
    if drafter.auxiliary_loss is not None:
        logps = logits.log_softmax(-1)
        loss = loss + drafter.auxiliary_loss(states, logps, logps.detach())["loss"].sum()
    loss.backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.requires_grad or name in FROZEN, name
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert target.head.weight.grad is None


def started_and_untouched(kind, target):
    """A drafter that starts from its target's weights, and the very same without them."""
    for init in (True, False):
        torch.manual_seed(0)
        yield create_drafter(kind, target, init_from_target=init, **tiny_options(kind, target))


def assert_starts_from_the_targets_layers(target, kind):
    """Of a kind that has layers as its target's: norms, attention and MLP."""
    drafter, untouched = started_and_untouched(kind, target)
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            assert "norm" not in name or torch.equal(parameter, parameter[:1].expand_as(parameter))
    # The norms must scale as the target's do, whichever way the family stores them (Gemma keeps w of 1 + w).
    scale = drafter.norm(torch.ones(target.hidden_size))
    torch.testing.assert_close(scale, target.decoder.norm(torch.ones(target.hidden_size)))
    assert scale.abs().min() > 0.5
    changed = [
        name
        for (name, mine), other in zip(drafter.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(mine, other)
    ]
    assert any("self_attn" in name for name in changed) and any("mlp" in name for name in changed)


def assert_checkpointing_keeps_less_and_changes_no_gradient(target, make_drafter):
    """`make_drafter()` gives the same drafter each time."""

    def run(drafter):
        rollout, kept = sample_texts(seed=8, device=target.device), []
        features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
        blocks = every_anchor(rollout, drafter.num_draft_tokens)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            states = drafter.draft(features, rollout.tokens, blocks)
        states.square().sum().backward()
        # A head of its own is not on the way to the states.
        gradients = {name: value.grad for name, value in drafter.named_parameters() if value.grad is not None}
        return {"states": states.detach(), **gradients}, sum(kept)

    plain, kept = run(make_drafter().train())
    drafter = make_drafter().train()
    drafter.activation_checkpointing_enable()
    recomputed, kept_when_recomputed = run(drafter)
    assert len(plain) > 1
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)
    assert kept_when_recomputed < kept / 2


# -- 7: saved and loaded, cut off and resumed -----------------------------------------------------------------------


def assert_same_drafter(target, first, second):
    """The same tensors, and the same proposals along the texts that they write with the target."""
    assert_same_weights(first, second)
    settings = SpeculationSettings(20, [], batch_size=4)
    ours, theirs = (
        speculate(target, drafter.bind(target), random_prompts(6, seed=3), settings) for drafter in (first, second)
    )
    assert ours.completions() == theirs.completions()
    assert_same_blocks(ours.blocks, theirs.blocks)


def assert_saves_and_loads(target, drafter, folder):
    drafter.save_pretrained(folder)
    loaded = load_drafter(str(folder))
    assert type(loaded) is type(drafter) and not loaded.training
    assert_same_drafter(target, drafter, loaded)


# Weights, optimizer, schedule, random state, order of rows, texts in use and buffer: all of it at once.
RESUMED = {
    "rollout_source": "speculation",
    "temperature": 0.8,
    "teacher_temperature": 0.8,
    "rejected_weight": 0.3,
    "lmbda": 0.5,
    "replay_buffer_size": 8,
    "replay_ratio": 0.5,
    "replay_by_loss": True,
    "steps_per_generation": 2,
    "lr_scheduler_type": "cosine",
    "max_steps": 6,
    "save_strategy": "steps",
    "logging_steps": 2,  # of which a checkpoint may cut a window in two
}


def assert_a_resumed_run_is_the_same_run(make_trainer, folder, *steps):
    """`make_trainer(output_dir, **options)` makes the same trainer each time; it is cut off after `steps` of six."""
    whole = make_trainer(folder / "whole", **{**RESUMED, "save_strategy": "no"})
    whole.train()
    assert any(loss is not None for entry in whole.error_buffer.entries.values() for loss in entry.losses.values())
    assert len(figures_of(whole)) == 3
    for step in steps:
        options = {**RESUMED, "save_steps": step}
        cut = make_trainer(folder / str(step), callbacks=[StopAt(step)], **options)
        cut.train()
        assert cut.state.global_step == step
        resumed = make_trainer(folder / str(step), **options)
        resumed.train(resume_from_checkpoint=str(folder / str(step) / f"checkpoint-{step}"))
        assert_same_weights(parameters_of(whole), parameters_of(resumed))
        assert whole.error_buffer.entries == resumed.error_buffer.entries
        assert figures_of(whole) == figures_of(resumed)
