"""Draws every run on the real model: docs/source/results/real.json → docs/source/images/real.png.

python examples/smollm/picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


DOCS = Path(__file__).resolve().parents[2] / "docs" / "source"
# By drafter, the names of its runs begin with these.
STARTS = {"DFlash": ("DFlash, plateau", "DFlash"), "EAGLE-3, early": ("first start", "first start")}
ARMS = {"SFT continued": "#8a8a8a", "Draft-OPD": "#d1495b"}


def main() -> None:
    by_law = json.loads((DOCS / "results" / "real.json").read_text())["tau"]
    figure, axes = plt.subplots(1, len(by_law), figsize=(10, 3.4), sharey=True, layout="constrained")
    for ax, (law, taus) in zip(axes, by_law.items(), strict=True):
        for row, (start, begins) in enumerate(STARTS.values()):
            for shift, (arm, color) in zip((-0.12, 0.12), ARMS.items(), strict=True):
                runs = [tau for name, tau in taus.items() if name.startswith(f"{begins}, {arm}, seed")]
                changes = [100 * (tau / taus[start] - 1) for tau in runs]
                ax.plot(changes, [row + shift] * len(runs), "o", color=color, label=arm if row == 0 else None)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(law, fontsize=10)
        ax.set_xlabel("τ over the start's, %")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(STARTS)), STARTS)
    axes[0].set_ylim(len(STARTS) - 0.5, -0.5)
    axes[-1].legend(frameon=False, fontsize=9)
    figure.savefig(DOCS / "images" / "real.png", dpi=140)


if __name__ == "__main__":
    main()
