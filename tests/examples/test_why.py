"""The decomposition of examples/benchmarks/why.py against numbers found another way."""

import argparse
import copy
import json

import pytest
import torch
from conftest import HELD_OUT, POCKET, ROOT, SHIPPED

from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.vocabulary import to_draft_ids
from draft_opd_trl.decoding.replay import text_blocks
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation.measure import measure_acceptance


EXAMPLES = ROOT / "examples"
LENGTH = 24


@pytest.fixture
def why(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import why

    return why


@pytest.fixture(scope="module")
def pair(qwen_target, qwen_drafter):
    """The start, and a drafter near it."""
    after = copy.deepcopy(qwen_drafter, {id(qwen_target): qwen_target})
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=draws))
    return {"start": qwen_drafter, "after": after}


def write(target, prompts, temperature):
    settings = SpeculationSettings(LENGTH, [], SamplingParams(temperature))
    return speculate(target, None, prompts, settings, torch.Generator().manual_seed(1))


def test_shares_and_acceptance_are_those_of_decoding(why, qwen_target, pair, prompts):
    texts = write(qwen_target, prompts, 0.0)
    found = why.examine(qwen_target, pair, texts, SamplingParams(0.0), batch_size=3)
    summary = why.summarise(found, texts, [])["drafters"]
    settings = SpeculationSettings(LENGTH, [])
    for name, drafter in pair.items():
        one, report = summary[name], measure_acceptance(qwen_target, drafter, prompts, settings)
        assert one["acceptance_length"] == pytest.approx(report.acceptance_length)
        by_slot = [a * b for a, b in zip(one["reached_by_slot"], one["accepted_if_reached"], strict=True)]
        assert by_slot == pytest.approx(report.acceptance_by_slot)
        blocks = speculate(qwen_target, drafter, prompts, settings).blocks
        slots = int(blocks.num_valid.sum())
        accepted, rejected = int(blocks.num_accepted.sum()) / slots, int(blocks.has_error.sum()) / slots
        expected = {"accepted": accepted, "first rejected": rejected, "suffix": 1 - accepted - rejected}
        assert one["shares"] == pytest.approx(expected)
    start, after = summary.values()
    assert start["acceptance_length"] != after["acceptance_length"]
    for label, (change, _) in after["change_from_start"]["ce"].items():
        assert change == pytest.approx(after["start_blocks"]["ce"][label] - start["start_blocks"]["ce"][label])


def by_hand(target, drafter, texts, blocks, temperature):
    """The first divergence of each slot `(N, K)`, from a plain target forward a block."""
    features, _ = target.forward_text(texts.tokens, drafter.target_layer_ids)
    hidden = drafter.draft(features, texts.tokens, blocks)
    losses = []
    for states, row, anchor, proposals in zip(
        hidden, blocks.texts, blocks.anchors.tolist(), blocks.draft_tokens, strict=True
    ):
        log_q = drafter.logits(states).log_softmax(-1)
        prefix = torch.cat([texts.tokens[row, : anchor + 1], proposals[:-1]])
        logits = target.model(input_ids=prefix[None]).logits[0, anchor:]
        best, inside = logits.argmax(-1), True
        if drafter.vocab_map is not None:
            best, inside = to_draft_ids(best, drafter.vocab_map)
            logits = logits[:, drafter.vocab_map]
        if temperature == 0:
            loss = -log_q.gather(1, best[:, None])[:, 0]
        else:
            log_p = (logits / temperature).log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1)
        losses.append(loss * inside)
    return torch.stack(losses)


@pytest.mark.parametrize(("temperature", "sample_proposals"), [(0.0, False), (1.3, False), (1.3, True)])
@torch.no_grad()
def test_divergences_are_those_of_plain_forwards(why, qwen_target, pair, prompts, temperature, sample_proposals):
    texts = write(qwen_target, prompts, temperature)
    found = why.examine(qwen_target, pair, texts, SamplingParams(temperature), sample_proposals, batch_size=3)
    drafter, sets = pair["after"], found["after"]
    kind = next(iter(sets["own"].values))
    for key, slots in sets.items():
        blocks = slots.blocks
        if key in ("start_text", "random"):
            blocks = text_blocks(texts, blocks.texts, blocks.anchors, blocks.num_draft_tokens)
        expected = by_hand(qwen_target, drafter, texts, blocks, temperature)
        inside = slots.classes >= 0
        torch.testing.assert_close(slots.values[kind][inside], expected[inside], rtol=1e-3, atol=1e-3)
    for name in ("texts", "anchors", "draft_tokens"):
        assert torch.equal(getattr(sets["start"].blocks, name), getattr(found["start"]["own"].blocks, name))


def test_changes_and_weights_by_hand(why):
    # Two texts, K = 3: a broken block, one of which the text's end leaves two slots, a whole one.
    blocks = DraftBlocks(
        torch.tensor([0, 0, 1]), torch.tensor([4, 6, 3]), torch.zeros(3, 3).long(), torch.tensor([1, 1, 3]),
        torch.tensor([3, 2, 3]),
    )  # fmt: skip
    before = why.Slots(blocks, {"ce": torch.ones(3, 3)}, torch.tensor([[4.0, 2.0, 1.0]] * 3))
    after = why.Slots(blocks, {"ce": torch.tensor([[2.0, 4, 8], [1, 2, 9], [1, 1, 1]])}, before.weights)
    assert before.classes.tolist() == [[0, 1, 2], [0, 1, -1], [0, 0, 0]]
    assert after.means("ce") == {"accepted": 6 / 5, "first rejected": 3.0, "suffix": 8.0}
    moved = why.changes(before, after, "ce")
    assert {label: mean for label, (mean, _) in moved.items()} == pytest.approx(
        {"accepted": 1 / 5, "first rejected": 2.0, "suffix": 7.0}
    )
    # Text 0 is 1 − 2 · 0.2 away from the mean, text 1 is 0 − 3 · 0.2.
    assert moved["accepted"][1] == pytest.approx(1.96 * (2 * 0.6**2) ** 0.5 / 5)
    assert before.shares(before.weights) == pytest.approx(
        {"accepted": 15 / 20, "first rejected": 4 / 20, "suffix": 1 / 20}
    )


def test_nothing_changes_without_training(why, qwen_target, qwen_drafter, prompts):
    texts = write(qwen_target, prompts, 1.0)
    drafters = {"start": qwen_drafter, "after": copy.deepcopy(qwen_drafter, {id(qwen_target): qwen_target})}
    summary = why.summarise(why.examine(qwen_target, drafters, texts, SamplingParams(1.0), True), texts, [])
    start, after = summary["drafters"].values()
    make_up = summary["make_up"]
    assert start == after
    assert {mean for kind in after["change_from_start"].values() for mean, _ in kind.values()} == {0.0}
    assert make_up["Draft-OPD, weight"]["suffix"] == 0 < make_up["SFT, weight"]["suffix"]
    # D-PACE moves weight forward and keeps a suffix; Spec-AUF cuts it off.
    assert make_up["Spec-AUF, weight"]["suffix"] == 0 < make_up["D-PACE, weight"]["suffix"]
    for shares in (start["shares"], *make_up.values()):
        assert sum(shares.values()) == pytest.approx(1.0)


def test_the_command_writes_what_it_promises(why, tmp_path, capsys):
    args = argparse.Namespace(
        origin=str(SHIPPED[0]), after=[("same", str(SHIPPED[0]))],
        target=str(POCKET / "target"), prompt_file=HELD_OUT, prompts=2,
        max_new_tokens=24, temperature=0.0, sample_proposals=False, seed=0, output=str(tmp_path),
    )  # fmt: skip
    why.main(args)
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    drafters = json.loads((tmp_path / "why.json").read_text())["drafters"]
    assert headline["tau"] == {name: one["acceptance_length"] for name, one in drafters.items()}
    assert f"| same | {headline['tau']['same']:.3f} | +0.000 [+0.000, +0.000] |" in (tmp_path / "why.md").read_text()
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    args.after = [("other", str(SHIPPED[-1]))]
    with pytest.raises(SystemExit, match="trained from --origin"):
        why.main(args)
    for wrong in ("outputs/opd", "=outputs/opd", "start=outputs/opd"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=FOLDER"):
            why.named_folder(wrong)
