"""What people read of a measurement: pictures of it, and a table in Markdown.

Knows no models; everything comes from [`AcceptanceReport`] and from a Trainer's log.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..core.files import atomic_file, write_atomically
from ..decoding.acceptance import DEFINITION, AcceptanceReport, difference
from .best_k import in_words


# Okabe–Ito colours, and a marker each, as colour alone does not tell lines apart for everyone.
COLORS = ("#777777", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
POSITION_BINS = 12


def save_report(
    reports: Mapping[str, AcceptanceReport],
    stem: Path,
    serving: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Save [`acceptance_table`] as `<stem>.md` and [`plot_acceptance`]'s picture as `<stem>.png`."""
    write_atomically(stem.with_name(stem.name + ".md"), acceptance_table(reports, serving) + "\n")
    plot_acceptance(reports, stem.with_name(stem.name + ".png"))


def acceptance_table(
    reports: Mapping[str, AcceptanceReport], serving: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> str:
    """
    Drafters side by side in Markdown, fit for a model card; the first is what the others are compared with.

    Args:
        reports (`Mapping[str, AcceptanceReport]`): By drafter, over the same prompts.
        serving (`Mapping[str, Sequence[Mapping]]`, *optional*): By drafter, what [`advice`] says, of the same batch
            sizes.
    """
    first, *others = reports.values()
    summaries = [report.summary() for report in reports.values()]

    def with_interval(value: float, interval: Sequence[float], form: str) -> str:
        low, high = interval
        return f"{value:{form}} [{low:{form}}, {high:{form}}]"

    figures = [("τ", [with_interval(one["acceptance_length"], one["interval"], ".3f") for one in summaries])]
    if others:
        changes = [difference(one, first) for one in others]
        cells = [with_interval(one["mean"], (one["low"], one["high"]), "+.3f") for one in changes]
        figures.append(("change of τ, paired", ["", *cells]))
    for slot in range(max(report.num_draft_tokens for report in reports.values())):
        cells = [
            f"{one['acceptance_by_slot'][slot]:.1%}" if slot < len(one["acceptance_by_slot"]) else ""
            for one in summaries
        ]
        figures.append((f"blocks with ≥ {slot + 1} accepted", cells))
    figures.append(("blocks accepted whole", [f"{one['blocks_fully_accepted']['value']:.1%}" for one in summaries]))
    for told in zip(*(serving[name] for name in reports), strict=True) if serving else ():
        figures.append((f"to serve with at batch {told[0]['batch_size']}", list(map(in_words, told))))
    lines = [f"| | {' | '.join(reports)} |", "|---" * (len(reports) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in figures]
    return "\n".join([*lines, "", f"{DEFINITION} Intervals: 95 % bootstrap over {len(first)} prompts."])


def plot_acceptance(
    reports: Mapping[str, AcceptanceReport],
    file: str | os.PathLike,
    histories: Mapping[str, Sequence[dict[str, float]]] | None = None,
) -> None:
    """
    Save a PNG: τ with its 95 % interval, acceptance by slot, where in the text errors fall, and τ over training steps.

    Args:
        reports (`Mapping[str, AcceptanceReport]`): By drafter, over the same prompts.
        file (`str` or `os.PathLike`): Where.
        histories (`Mapping[str, Sequence[dict]]`, *optional*): A Trainer's `state.log_history` by run, with
            evaluations.
    """
    save_figure(acceptance_figure(reports, histories), file)


def looks_of(names: Iterable[str]) -> dict[str, dict]:
    """A colour and a marker for each name, as options of matplotlib's `plot`."""
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        for i, name in enumerate(names)
    }


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `rows × columns` empty plots in the house's style, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, file: str | os.PathLike) -> None:
    """The whole PNG or none of it."""
    with atomic_file(file) as part:
        figure.savefig(part, dpi=120, format="png")


def acceptance_figure(
    reports: Mapping[str, AcceptanceReport], histories: Mapping[str, Sequence[dict[str, float]]] | None = None
) -> Figure:
    """The figure that [`plot_acceptance`] saves."""
    names = list(dict.fromkeys(chain(reports, histories or {})))
    looks = looks_of(names)
    figure, axes = new_figure(2, 2, (11, 8)) if histories else new_figure(1, 3, (15, 4.2))
    _plot_tau(axes[0], reports, looks)
    _plot_slots(axes[1], reports, looks)
    _plot_errors(axes[2], reports, looks)
    if histories:
        _plot_steps(axes[3], histories, looks)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _plot_tau(axis: Axes, reports: Mapping[str, AcceptanceReport], looks: Mapping[str, dict]) -> None:
    for place, (name, report) in enumerate(reports.items()):
        tau, (low, high) = report.acceptance_length, report.intervals["acceptance_length"]
        axis.errorbar(tau, place, xerr=[[tau - low], [high - tau]], capsize=4, **looks[name])
        axis.annotate(f"{tau:.2f}", (tau, place), (0, 7), textcoords="offset points", ha="center")
    axis.set(title="Acceptance length", xlabel="τ, tokens per verification (95 % interval)", yticks=[])
    axis.set_ylim(len(reports) - 0.5, -0.6)
    axis.spines["left"].set_visible(False)


def _plot_slots(axis: Axes, reports: Mapping[str, AcceptanceReport], looks: Mapping[str, dict]) -> None:
    for place, (name, report) in enumerate(reports.items()):
        shares = np.array(report.acceptance_by_slot)
        bounds = np.array([report.intervals[f"acceptance_slot_{slot}"] for slot in range(1, len(shares) + 1)]).T
        # A little apart, so that intervals do not hide each other.
        slots = np.arange(1, len(shares) + 1) + 0.07 * (place - (len(reports) - 1) / 2)
        axis.errorbar(slots, shares, yerr=abs(bounds - shares), capsize=3, label=name, **looks[name])
    axis.set(title="Acceptance by slot", xlabel="slot k", ylabel="blocks with the first k accepted", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _plot_errors(axis: Axes, reports: Mapping[str, AcceptanceReport], looks: Mapping[str, dict]) -> None:
    lengths = [len(text) for report in reports.values() for text in report.completions]
    # The few longest texts leave too few tokens in a bin to say anything.
    edges = np.linspace(1, max(np.quantile(lengths, 0.95), 2), POSITION_BINS + 1)
    for name, report in reports.items():
        axis.plot((edges[:-1] + edges[1:]) / 2, 100 * error_density(report, edges), **looks[name])
    axis.set(title="Where errors fall", xlabel="position in the text, tokens", ylabel="errors per 100 tokens")
    axis.set_ylim(bottom=0)


def _plot_steps(axis: Axes, histories: Mapping[str, Sequence[dict]], looks: Mapping[str, dict]) -> None:
    for name, history in histories.items():
        logs = [log for log in history if "eval_acceptance_length" in log]
        steps = [log["step"] for log in logs]
        axis.plot(steps, [log["eval_acceptance_length"] for log in logs], label=name, **looks[name])
        low, high = ([log[f"eval_acceptance_length_{end}"] for log in logs] for end in ("low", "high"))
        axis.fill_between(steps, low, high, color=looks[name]["color"], alpha=0.12, linewidth=0)
    axis.set(title="During training", xlabel="step", ylabel="τ (95 % interval)")


def error_density(report: AcceptanceReport, edges: np.ndarray) -> np.ndarray:
    """
    Errors a token, by position in the text.

    Args:
        report ([`AcceptanceReport`]): Of any prompts.
        edges (`np.ndarray` of shape `(bins + 1,)`): Of the bins, in tokens from the completion's start.

    Returns:
        `np.ndarray` of shape `(bins,)`; NaN where no text reaches.
    """
    errors, lengths = [], [len(text) for text in report.completions]
    for length, runs in zip(lengths, report.accepted, strict=True):
        anchor = 0
        for run in runs:
            if run < min(report.num_draft_tokens, length - 1 - anchor):
                errors.append(anchor + run + 1)
            anchor += run + 1
    tokens = np.concatenate([np.arange(1, length) for length in lengths])
    written, found = np.histogram(tokens, edges)[0], np.histogram(errors, edges)[0]
    return np.divide(found, written, out=np.full(len(written), np.nan), where=written > 0)
