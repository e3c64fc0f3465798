"""How the findings of why.py look: tables in Markdown, and a picture. Knows no models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from draft_opd_trl.evaluation.report import COLORS, looks_of, new_figure


NAMES = {"ce": "cross-entropy", "forward_kl": "forward KL", "reverse_kl": "reverse KL", "tv": "total variation"}
CLASS_COLORS = (COLORS[4], COLORS[6], COLORS[5])


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([caption, "", *lines])


def _shares(values: Iterable[float]) -> list[str]:
    return [f"{value:.1%}" for value in values]


def _numbers(values: Iterable[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def tables(summary: Mapping[str, Any]) -> str:
    """All that `summarise` returns, in Markdown."""
    drafters = summary["drafters"]
    start = next(iter(drafters.values()))
    classes, kinds = list(start["shares"]), list(start["own_blocks"])
    slots = [f"slot {slot}" for slot in range(1, len(start["reached_by_slot"]) + 1)]
    rows = []
    for name, one in drafters.items():
        low, high = one["change_interval"]
        change = "" if one is start else f"{one['change']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append([name, f"{one['acceptance_length']:.3f}", change, *_shares(one["shares"].values())])
    caption = "**1. Slots.** What verification said of the slots proposed; change of τ, paired, 95 % interval."
    parts = [_table(caption, ["drafter", "τ", "change of τ", *classes], rows)]

    rows = [
        [
            name,
            *(f"{p:.1%} ({r:.0%})" for p, r in zip(one["accepted_if_reached"], one["reached_by_slot"], strict=True)),
        ]
        for name, one in drafters.items()
    ]
    caption = "**2. Slot by slot.** Chance that a slot is accepted if those before it were (share of blocks that far)."
    parts.append(_table(caption, ["drafter", *slots], rows))

    parts += [_divergence_table(drafters, kind) for kind in kinds]

    rows = []
    for label, values in summary["anchors"].items():
        kind, _, where = label.partition(", ")
        rows.append([f"{NAMES.get(kind, 'entropy of the target')}, {where}", *_numbers(values)])
    caption = "**4. Anchors.** What stands at the start's exposed anchors and at random ones; given the text, nats."
    parts.append(_table(caption, ["", *slots], rows))

    rows = [[name, *_shares(values.values())] for name, values in summary["make_up"].items()]
    caption = "**5. Weight.** Slots that the training loss weighs, and where it finds its loss; at the start."
    parts.append(_table(caption, ["", *classes], rows))

    rows = [[name, *_numbers(one["losses"].values())] for name, one in drafters.items()]
    caption = f"**6. Losses.** What each training lowers ({NAMES[kinds[0]]}), on held-out texts."
    parts.append(_table(caption, ["drafter", *start["losses"]], rows))
    return "\n\n".join(parts)


def _divergence_table(drafters: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    (origin, start), *others = drafters.items()

    def differences(moved: Mapping[str, Sequence[float]]) -> list[str]:
        return [f"{mean:+.3f} ± {half:.3f}" for mean, half in moved.values()]

    rows = [[origin, *_numbers(start["start_blocks"][kind].values())]]
    for name, one in others:
        cells = zip(
            _numbers(one["start_blocks"][kind].values()), differences(one["change_from_start"][kind]), strict=True
        )
        rows.append([name, *(f"{value} ({change})" for value, change in cells)])
    rows += [[f"{name} − {others[0][0]}", *differences(one["change_from_control"][kind])] for name, one in others[1:]]
    rows += [[f"{name}, own blocks", *_numbers(one["own_blocks"][kind].values()), ""] for name, one in others]
    caption = f"**3. Divergence: {NAMES[kind]},** on the start's blocks (its change; paired, 95 % intervals)."
    return _table(caption, ["drafter", *start["start_blocks"][kind]], rows)


def picture(summary: Mapping[str, Any]) -> Figure:
    """The main lines of the tables."""
    drafters = summary["drafters"]
    start = next(iter(drafters.values()))
    kind, looks = next(iter(start["own_blocks"])), looks_of(drafters)
    figure, axes = new_figure(2, 2, (11, 8))
    slots = range(1, len(start["reached_by_slot"]) + 1)
    for name, one in drafters.items():
        axes[0].plot(slots, one["accepted_if_reached"], label=name, **looks[name])
    axes[0].set(title="Chance that a slot is accepted, if reached", xlabel="slot k")
    axes[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    _plot_changes(axes[1], {name: one["change_from_start"][kind] for name, one in drafters.items()}, looks)
    axes[1].set(title=f"Change of {NAMES[kind]} on the start's blocks", ylabel="nats (95 % interval)")
    for where, style in (("random", "--"), ("exposed", "-")):
        values = summary["anchors"][f"{kind}, {where} anchors"]
        axes[2].plot(slots, values, style, color=COLORS[0], marker="o", markersize=5, label=f"{where} anchors")
    axes[2].set(title=f"Anchors: {NAMES[kind]} of the start", xlabel="slot k", ylabel="nats")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False)
    for axis in (axes[0], axes[2]):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plot_make_up(axes[3], summary["make_up"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(looks), frameon=False)
    return figure


def _plot_changes(axis: Axes, moved: Mapping[str, Mapping[str, Sequence[float]]], looks: Mapping[str, dict]) -> None:
    origin, *others = moved
    axis.axhline(0, color=looks[origin]["color"], linewidth=1)
    for place, name in enumerate(others):
        means, halves = zip(*moved[name].values(), strict=True)
        places = [column + 0.12 * (place - (len(others) - 1) / 2) for column in range(len(means))]
        axis.errorbar(places, means, yerr=halves, capsize=3, linestyle="none", **looks[name])
    axis.set_xticks(range(len(moved[origin])), [label.replace(", ", ",\n") for label in moved[origin]])


def _plot_make_up(axis: Axes, make_up: Mapping[str, Mapping[str, float]]) -> None:
    for place, shares in enumerate(make_up.values()):
        left = 0.0
        for (label, share), color in zip(shares.items(), CLASS_COLORS, strict=True):
            axis.barh(place, share, left=left, color=color, label=label if place == 0 else None)
            left += share
    axis.set_yticks(range(len(make_up)), make_up)
    axis.invert_yaxis()
    axis.set_axisbelow(True)
    axis.set(title="Where weight and loss stand, at the start", xlim=(0, 1))
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
