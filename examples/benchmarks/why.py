"""What on-policy training changes, measured: shares, divergences before and after, anchors, and where weight goes.

    python examples/benchmarks/why.py --origin examples/pocket/drafter-dflash --temperature 0 --output outputs/why \
        --after "SFT continued=outputs/quickstart/drafter-sft" "Draft-OPD=outputs/quickstart/drafter-opd"

The target writes held-out texts alone; every drafter is replayed along them. docs/source/why.md says what is asked and
how to read the answers. Writes why.json, why.md and why.png; ends by printing one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributions import Categorical
from tqdm.auto import tqdm
from why_report import picture, tables

from draft_opd_trl import (
    AcceptanceReport,
    SamplingParams,
    SpeculationSettings,
    Target,
    bootstrap_interval,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.files import write_atomically
from draft_opd_trl.core.records import DraftBlocks, ReplayBatch, Rollout
from draft_opd_trl.decoding.replay import text_blocks
from draft_opd_trl.drafters.base import Drafter
from draft_opd_trl.evaluation.report import save_figure
from draft_opd_trl.texts.prompts import tokenize_dataset
from draft_opd_trl.texts.rows import load_prompts
from draft_opd_trl.training.batching import BatchMaker
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.divergences import LossSettings
from draft_opd_trl.training.loading import load_pair
from draft_opd_trl.training.losses import Heads, hard_tokens, stream_loss
from draft_opd_trl.training.streams import StreamSettings, dpace_weights, stream_weights


POCKET = Path(__file__).resolve().parents[1] / "pocket"
START = "start"
# What verification said of a slot; the suffix is what stands behind the first rejection.
CLASSES = ("accepted", "first rejected", "suffix")
# A suffix is judged given the drafted prefix. SFT teaches the same slots given the text.
TAUGHT_SUFFIX = "suffix, given the text"
RANDOM_ANCHORS = 32
CE, DPACE_ALPHA = LossSettings("ce", 0.0), 0.5


@dataclass
class Slots:
    """
    Blocks, and what one drafter makes of each of their slots.

    Args:
        blocks ([`DraftBlocks`]): Whose proposals were judged.
        values (`dict[str, torch.Tensor]` of shapes `(N, K)`): By name; nats, but `tv` is a probability.
        weights (`torch.Tensor` of shape `(N, K)`): Of the slots in a training loss.
    """

    blocks: DraftBlocks
    values: dict[str, torch.Tensor]
    weights: torch.Tensor

    @classmethod
    def cat(cls, parts: Sequence[Slots], first_texts: Sequence[int]) -> Slots:
        """Parts under each other, on the CPU; a part's text 0 becomes its first text."""
        blocks = DraftBlocks.cat([part.blocks for part in parts]).to("cpu")
        blocks.texts += torch.tensor(first_texts).repeat_interleave(torch.tensor([len(part.blocks) for part in parts]))
        values = {name: torch.cat([part.values[name] for part in parts]).cpu() for name in parts[0].values}
        return cls(blocks, values, torch.cat([part.weights for part in parts]).cpu())

    @property
    def classes(self) -> torch.Tensor:
        """`(N, K)`: place in `CLASSES`, −1 outside the text."""
        slots = torch.arange(self.blocks.num_draft_tokens)
        behind = slots - self.blocks.num_accepted[:, None]
        return (behind.sign() + 1).masked_fill(slots >= self.blocks.num_valid[:, None], -1)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Of values `(N, K)`, by class `(3,)`."""
        return torch.stack([values[self.classes == place].double().sum() for place in range(len(CLASSES))])

    def shares(self, values: torch.Tensor) -> dict[str, float]:
        """How a sum over all slots is made up."""
        sums = self.sums(values)
        return dict(zip(CLASSES, (sums / sums.sum()).tolist(), strict=True))

    def means(self, name: str) -> dict[str, float]:
        """By class."""
        means = self.sums(self.values[name]) / self.sums(torch.ones_like(self.weights)).clamp(min=1)
        return dict(zip(CLASSES, means.tolist(), strict=True))

    def means_by_slot(self, name: str) -> list[float]:
        inside = self.classes >= 0
        return ((self.values[name] * inside).sum(0) / inside.sum(0).clamp(min=1)).tolist()

    def loss(self, name: str) -> float:
        """The weighted mean, which training lowers."""
        return float((self.values[name] * self.weights).sum() / self.weights.sum())


def changes(before: Slots, after: Slots, name: str) -> dict[str, tuple[float, float]]:
    """By class, the change of the mean over the same blocks, and half its 95 % interval (texts are independent)."""
    found = {}
    for place, label in enumerate(CLASSES):
        inside = (before.classes == place).double()
        moved = (after.values[name] - before.values[name]) * inside
        by_text = torch.zeros(int(before.blocks.texts.max()) + 1, 2, dtype=torch.float64)
        by_text.index_add_(0, before.blocks.texts, torch.stack([moved.sum(1), inside.sum(1)], dim=1))
        sums, counts = by_text.T
        total = counts.sum().clamp(min=1)
        mean = sums.sum() / total
        found[label] = float(mean), 1.96 * float((sums - mean * counts).square().sum().sqrt() / total)
    return found


def compare(before: Mapping[str, Slots], after: Mapping[str, Slots]) -> dict[str, dict[str, tuple[float, float]]]:
    """[`changes`] of each divergence on the start's blocks, between two drafters' sets of slots."""
    found = {}
    for kind in before["start"].values:
        taught_suffix = changes(before["start_text"], after["start_text"], kind)["suffix"]
        found[kind] = {**changes(before["start"], after["start"], kind), TAUGHT_SUFFIX: taught_suffix}
    return found


def divergences(
    drafter: Drafter,
    batch: ReplayBatch,
    blocks: DraftBlocks,
    states: torch.Tensor,
    tokens: torch.Tensor,
    settings: Sequence[LossSettings],
) -> dict[str, torch.Tensor]:
    """
    Each divergence at each slot `(N, K)`, as training computes it.

    Args:
        blocks ([`DraftBlocks`]): What the drafter reads, from the batch's anchors.
        states (`torch.Tensor` of shape `(N, K, H)`): The target's.
        tokens (`torch.LongTensor` of shape `(N, K)`): What it holds right, where it is a point mass.
    """
    # Without a loss of the drafter's own, which is no divergence.
    heads = replace(Heads.of(drafter, drafter.target), auxiliary=None, auxiliary_reads_target=False)
    hidden = drafter.draft(batch.features, batch.tokens, blocks)
    # Each slot as a block of its own: `stream_loss` sums over blocks.
    hidden, states, labels = (part.flatten(0, 1)[:, None] for part in (hidden, states, tokens))
    ones = torch.ones(labels.shape, device=labels.device)
    return {one.kind: stream_loss(hidden, states, labels, ones, heads, one)[0].view_as(tokens) for one in settings}


def drafted(drafter: Drafter, batch: ReplayBatch, settings: Sequence[LossSettings]) -> dict[str, torch.Tensor]:
    """Divergences where the target reads the drafted prefix, which is the text up to the first rejected slot."""
    tokens = batch.labels
    if settings[0].hard:
        heads = Heads.of(drafter, drafter.target)
        on_text = torch.arange(tokens.shape[1], device=tokens.device) <= batch.blocks.num_accepted[:, None]
        wanted = hard_tokens(batch.draft_states, torch.ones_like(batch.accepted_weights), heads)
        tokens = torch.where(on_text, tokens, wanted)
    return divergences(drafter, batch, batch.blocks, batch.draft_states, tokens, settings)


def taught(
    drafter: Drafter, texts: Rollout, batch: ReplayBatch, settings: Sequence[LossSettings]
) -> dict[str, torch.Tensor]:
    """Divergences where both read the text from the same anchors, as in SFT."""
    blocks = text_blocks(texts, batch.blocks.texts, batch.blocks.anchors, drafter.num_draft_tokens)
    return divergences(drafter, batch, blocks, batch.text_states, batch.labels, settings)


def entropies(target: Target, batch: ReplayBatch, temperature: float) -> torch.Tensor:
    """Of the target at each slot `(N, K)`, given the text, in nats; at temperature 1 where texts are greedy."""
    parts = [
        Categorical(logits=target.logits(part) / (temperature or 1.0), validate_args=False).entropy()
        for part in batch.text_states.flatten(0, 1).split(256)
    ]
    return torch.cat(parts).view_as(batch.labels)


def examine_batch(
    target: Target, drafters: Mapping[str, Drafter], texts: Rollout, sampling: SamplingParams, sample_proposals: bool
) -> dict[str, dict[str, Slots]]:
    """One batch of texts, see [`examine`]."""
    kinds = ("ce", "tv") if sampling.greedy else ("forward_kl", "reverse_kl", "tv")
    settings = [LossSettings(kind, sampling.temperature) for kind in kinds]
    proposals = sampling if sample_proposals else None

    def replayed(drafter: Drafter, count: int, rejected_weight: float, anchors: str = "exposed") -> ReplayBatch:
        streams, on_policy = StreamSettings(rejected_weight=rejected_weight), OnPolicySettings(anchors, count)
        make_batches = BatchMaker(target, drafter, streams, on_policy, seed=0, proposals=proposals)
        (batch,), _ = make_batches([texts], step=0, lmbda=1.0)
        return batch

    def exposed(drafter: Drafter) -> ReplayBatch:
        return replayed(drafter, texts.tokens.shape[1], rejected_weight=1.0)

    origin = next(iter(drafters.values()))
    start, random = exposed(origin), replayed(origin, RANDOM_ANCHORS, rejected_weight=0.0, anchors="random")
    sft_blocks = text_blocks(texts, random.blocks.texts, random.blocks.anchors, origin.num_draft_tokens)
    off_policy = torch.zeros_like(sft_blocks.texts, dtype=torch.bool)
    sft_weights, _ = stream_weights(sft_blocks, off_policy, StreamSettings(sft_decay=origin.sft_decay))
    found: dict[str, dict[str, Slots]] = {}
    for name, drafter in drafters.items():
        own = start if drafter is origin else exposed(drafter)
        found[name] = {
            "own": Slots(own.blocks, drafted(drafter, own, settings), own.accepted_weights),
            "start": Slots(start.blocks, drafted(drafter, start, settings), start.accepted_weights),
            "start_text": Slots(start.blocks, taught(drafter, texts, start, settings), start.accepted_weights),
            "random": Slots(random.blocks, taught(drafter, texts, random, settings[:1]), sft_weights),
        }
        if drafter is origin:
            for key, batch in (("start_text", start), ("random", random)):
                found[name][key].values["entropy"] = entropies(target, batch, sampling.temperature)
            found[name] |= controls_of(found[name]["random"], random, taught(drafter, texts, random, [CE])["ce"])
    return found


def controls_of(sft: Slots, random: ReplayBatch, ce: torch.Tensor) -> dict[str, Slots]:
    """What controls make of SFT's blocks: `cut` at the own first wrong slot (Spec-AUF), or weighed by D-PACE."""
    weighed = dpace_weights((-ce).exp(), sft.weights > 0, DPACE_ALPHA)
    return {"cut": replace(sft, weights=random.accepted_weights), "dpace": replace(sft, weights=weighed)}


@torch.no_grad()
def examine(
    target: Target,
    drafters: Mapping[str, Drafter],
    texts: Rollout,
    sampling: SamplingParams,
    sample_proposals: bool = False,
    batch_size: int = 16,
) -> dict[str, dict[str, Slots]]:
    """
    Replay every drafter along the texts, at the anchors verification exposes and at random ones.

    Args:
        drafters (`Mapping[str, Drafter]`): Bound to the target, all reading the same layers and of the same K; the
            first is the start.
        texts ([`Rollout`]): Written by the target under `sampling`.
        sample_proposals (`bool`, *optional*, defaults to `False`): Proposals are drawn; otherwise they are the argmax.

    Returns:
        By drafter, four sets of [`Slots`]: its `own` blocks and the `start`'s, given what was drafted; and the
        start's exposed anchors (`start_text`) and random ones (`random`), given the text. But for `own`, classes are
        those of the start's proposals. Weights are SFT's in `random`, else those of the accepted stream. Of the start
        also [`controls_of`] its `random`.
    """
    batches, first_texts = [], range(0, len(texts), batch_size)
    for first in tqdm(first_texts, desc="Replaying", leave=False):
        some = texts.part(first, min(first + batch_size, len(texts)))
        batches.append(examine_batch(target, drafters, some, sampling, sample_proposals))
    return {
        name: {key: Slots.cat([batch[name][key] for batch in batches], first_texts) for key in sets}
        for name, sets in batches[0].items()
    }


def report_of(texts: Rollout, blocks: DraftBlocks, stops: Sequence[int]) -> AcceptanceReport:
    """What verification said, from all blocks of the texts."""
    runs: list[list[int]] = [[] for _ in range(len(texts))]
    for text, run in zip(blocks.texts.tolist(), blocks.num_accepted.tolist(), strict=True):
        runs[text].append(run)
    completions = texts.completions()
    stopped = [text[-1] in stops for text in completions]
    return AcceptanceReport(blocks.num_draft_tokens, completions, runs, stopped, 0.0)


def summarise(found: Mapping[str, Mapping[str, Slots]], texts: Rollout, stops: Sequence[int]) -> dict[str, Any]:
    """
    What [`examine`] found in numbers, JSON-able.

    Returns:
        `drafters`, by name, of which the second is the control; and of the start the divergence by slot at both kinds
        of `anchors`, and the losses' `make_up`.
    """
    start, control, *_ = found.values()
    kinds = list(start["own"].values)
    before = report_of(texts, start["own"].blocks, stops)
    summary = {}
    for name, sets in found.items():
        own, report = sets["own"], report_of(texts, sets["own"].blocks, stops)
        accepted, judged = own.classes == 0, own.classes >= 0
        reached = accepted | (own.classes == 1)
        summary[name] = {
            "acceptance_length": report.acceptance_length,
            "change": report.acceptance_length - before.acceptance_length,
            "change_interval": bootstrap_interval(report, before),
            "shares": own.shares(torch.ones_like(own.weights)),
            "reached_by_slot": (reached.sum(0) / judged.sum(0).clamp(min=1)).tolist(),
            "accepted_if_reached": (accepted.sum(0) / reached.sum(0).clamp(min=1)).tolist(),
            "start_blocks": {
                kind: {**sets["start"].means(kind), TAUGHT_SUFFIX: sets["start_text"].means(kind)["suffix"]}
                for kind in kinds
            },
            "change_from_start": compare(start, sets),
            "change_from_control": compare(control, sets),
            "own_blocks": {kind: own.means(kind) for kind in kinds},
            "losses": {
                "SFT's, random anchors": sets["random"].loss(kinds[0]),
                "Draft-OPD's, start's blocks": sets["start"].loss(kinds[0]),
                "Draft-OPD's, own blocks": own.loss(kinds[0]),
            },
        }
    anchors = {
        f"{label}, {where} anchors": start[key].means_by_slot(label)
        for label in (kinds[0], "entropy")
        for where, key in (("random", "random"), ("exposed", "start_text"))
    }
    arms = {"SFT": start["random"], "D-PACE": start["dpace"], "Spec-AUF": start["cut"], "Draft-OPD": start["own"]}
    make_up = {
        f"{arm}, {what}": part.shares(part.weights * values)
        for arm, part in arms.items()
        for what, values in (("weight", torch.ones_like(part.weights)), ("loss", part.values[kinds[0]]))
    }
    return {"drafters": summary, "anchors": anchors, "make_up": make_up}


def named_folder(text: str) -> tuple[str, str]:
    """`NAME=FOLDER`."""
    name, _, folder = text.partition("=")
    if not (name and folder) or name == START:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, with a name other than {START!r}")
    return name, folder


def main(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    folders = {START: args.origin, **dict(args.after)}
    target, loaded, tokenizer = load_pair(list(folders.values()), args.target)
    for folder, drafter in zip(folders.values(), loaded, strict=True):
        shape, origin = ((one.num_draft_tokens, one.target_layer_ids) for one in (drafter, loaded[0]))
        if shape != origin:
            raise SystemExit(
                f"{folder} proposes {shape[0]} tokens from layers {shape[1]}, and --origin {origin[0]} tokens from "
                f"{origin[1]}, so they share no blocks. Give drafters that were trained from --origin."
            )
    rows = load_prompts(args.prompt_file).select(range(args.prompts))
    prompts = list(tokenize_dataset(rows, tokenizer, None, name=args.prompt_file)["prompt_ids"])
    stops, sampling = stop_token_ids(target.model, tokenizer), SamplingParams(args.temperature)
    settings = SpeculationSettings(args.max_new_tokens, stops, sampling, batch_size=64)
    texts = speculate(target, None, prompts, settings, torch.Generator(target.device).manual_seed(args.seed))
    found = examine(target, dict(zip(folders, loaded, strict=True)), texts, sampling, args.sample_proposals)
    summary = summarise(found, texts, stops)
    result = {"arguments": vars(args), "seconds": time.perf_counter() - began, **summary}
    output = Path(args.output)
    write_atomically(output / "why.json", json.dumps(result, indent=2))
    write_atomically(output / "why.md", tables(summary) + "\n")
    save_figure(picture(summary), output / "why.png")
    headline = {
        "tau": {name: one["acceptance_length"] for name, one in summary["drafters"].items()},
        "shares": summary["drafters"][START]["shares"],
        "sft_weight_behind_first_error": summary["make_up"]["SFT, weight"]["suffix"],
        "sft_loss_behind_first_error": summary["make_up"]["SFT, loss"]["suffix"],
        "seconds": result["seconds"],
    }
    print(tables(summary) + "\n\n" + json.dumps(headline))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--origin", required=True, help="drafter that the others were trained from")
    parser.add_argument(
        "--after", type=named_folder, nargs="+", required=True, help="NAME=FOLDER of those trained; control first"
    )
    parser.add_argument("--target", default=str(POCKET / "target"))
    parser.add_argument("--prompt-file", default=str(POCKET / "prompts" / "heldout.jsonl"))
    parser.add_argument("--prompts", type=int, default=256, help="how many of them")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the texts and of the target's law")
    parser.add_argument("--sample-proposals", action="store_true", help="draw proposals; the argmax by default")
    parser.add_argument("--seed", type=int, default=0, help="of the texts, at temperature > 0")
    parser.add_argument("--output", default="outputs/why")
    main(parser.parse_args())
