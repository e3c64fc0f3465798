"""The arms of the study of recipes: the default recipe, its controls, and what tells one effect from another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.training.divergences import HARD_LOSSES
from draft_opd_trl.training.recipe import read_recipe
from draft_opd_trl.training.streams import StreamSettings


START, SFT, EQUAL_TIME = "start", "SFT continued", "SFT continued, equal time"
SOFT, DEFAULT, PAPER = "SFT continued, soft targets", "default recipe", "the paper's preset"
AUF, DPACE = "Spec-AUF", "SFT continued, D-PACE weights"
LK, LENGTH = "SFT continued, lk", "SFT continued, accepted_length"
# What Draft-OPD has to beat, and the recipe of each. Where the target draws, SFT may learn its law, too.
RECIPES = {SFT: "sft", DPACE: "dpace", AUF: "auf", LK: "lk", LENGTH: "accepted_length"}
CONTROLS = {0.0: tuple(RECIPES), 1.0: (*RECIPES, SOFT)}
# Each at the best of the same rates.
TUNED = {temperature: (DEFAULT, *controls) for temperature, controls in CONTROLS.items()}
# On every seed. The paper's preset is one for greedy texts.
LEADING = {0.0: (*CONTROLS[0.0], DEFAULT, PAPER), 1.0: (*CONTROLS[1.0], DEFAULT)}
THE_PAPERS = read_recipe("paper")
# Recipes with AdamW instead of Muon, and its rate. The first is the paper's.
ADAMW = {PAPER: THE_PAPERS["learning_rate"], "AdamW at 3e-4": 3e-4, "AdamW at 1e-3": 1e-3}
# Of the paper's preset: the same for every recipe here.
SHARED = {"temperature", "max_completion_length", "num_train_epochs"}
SHARED |= {"per_device_train_batch_size", "gradient_accumulation_steps"}


@dataclass
class StudyConfig(DraftOPDConfig):
    """Settings, and one that only tells one effect from another."""

    whole_blocks: bool = field(default=False, metadata={"help": "Teach the text behind the first rejection too."})

    @property
    def streams(self) -> StreamSettings:
        return replace(super().streams, whole_blocks=self.whole_blocks)


def changes(recipe: str) -> dict[str, Any]:
    """What a recipe of the package changes of the default one."""
    default = read_recipe("default")
    return {name: value for name, value in read_recipe(recipe).items() if value != default[name]}


def variants(temperature: float) -> dict[str, dict[str, Any]]:
    """What each arm changes of the default recipe."""
    own = DraftOPDConfig("unused", temperature=temperature, report_to="none")
    weights = {"dpace_alpha": changes("dpace")["dpace_alpha"]}
    table: dict[str, dict[str, Any]] = {
        **{name: changes(recipe) for name, recipe in RECIPES.items()},
        SFT: {**changes("sft"), "accepted_loss": "ce"},
        SOFT: {**changes("sft"), "accepted_loss": "forward_kl", "teacher_temperature": 1.0},
        DEFAULT: {},
        PAPER: {name: value for name, value in THE_PAPERS.items() if name not in SHARED},
        "D-PACE weights": weights,
        "Spec-AUF, D-PACE weights": {**changes("auf"), **weights},
        "whole blocks": {"whole_blocks": True},
        "rejected stream at 0.1": {"rejected_weight": 0.1},
        "rejected stream at 1": {"rejected_weight": 1.0},
    }
    losses = {name for name in THE_PAPERS if any(part in name for part in ("loss", "clamp", "decay", "weight"))}
    paper = {name: THE_PAPERS[name] for name in losses | {"teacher_temperature"}}
    table["the paper's losses, our optimizer"] = paper
    teachers = dict.fromkeys(HARD_LOSSES, temperature) | dict.fromkeys(("forward_kl", "reverse_kl", "jsd"), 1.0)
    if temperature > 0:
        teachers["log_acceptance"] = temperature
    for kind, teacher in teachers.items():
        if kind != own.accepted_loss:
            table[f"{kind}, teacher at {teacher:g}"] = {"accepted_loss": kind, "teacher_temperature": teacher}
    if temperature > 0:
        return table | {
            "tv, drawn proposals": {"accepted_loss": "tv", "sample_proposals": True},
            # At T = 0 this is Spec-AUF.
            "random anchors, own proposals": {"anchors": "random"},
            "ce, D-PACE weights": {"accepted_loss": "ce", **weights},
        }
    return table | {
        "rejected stream at 0.3": {"rejected_weight": 0.3},
        "rejected stream at 0.3, first slot": {"rejected_weight": 0.3, "rejected_decay": 0.0},
        "earlier slots weigh more": {"accepted_decay": 0.8},
        "half of it SFT": {"lmbda": 0.5},
        **{recipe: {} for recipe in ADAMW if recipe != PAPER},
    }
