"""Settings that cannot stand together: of each pair what was set, why it cannot be, and what to do."""

from __future__ import annotations

import shlex
import shutil
from typing import Any

from ..core.endpoint import printable
from ..core.errors import InputError
from ..core.redaction import redact_url
from .divergences import HARD_LOSSES
from .optim import MUON


def check_together(args: Any) -> None:
    """
    Settings that are right each by itself, as [`DraftOPDConfig`] has them.

    Raises:
        `ValueError`: Two of them contradict each other, or ask for what is not there.
    """
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise InputError(
            f"steps_per_generation={args.steps_per_generation} is not a multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}, so a text would be split between optimizer steps. Make it one."
        )
    if args.accepted_weight == 0 and args.rejected_weight == 0:
        raise InputError(
            "accepted_weight and rejected_weight are both 0, so nothing would be learnt. Set one above 0."
        )
    for name, weight in (("accepted_loss", args.accepted_weight), ("rejected_loss", args.rejected_weight)):
        if weight > 0 and args.teacher_temperature == 0 and getattr(args, name) not in HARD_LOSSES:
            raise InputError(
                f"{name}={getattr(args, name)!r} compares distributions, but teacher_temperature=0 makes the "
                f"target a point mass. Use one of {', '.join(HARD_LOSSES)}, or set teacher_temperature above 0."
            )
    if args.streams.scores_rejected and args.rejected_loss == "accepted_length":
        raise InputError(
            "rejected_loss='accepted_length' counts slots from the block's first, but the rejected stream begins "
            "later. Use it for the accepted stream only."
        )
    if args.state_store_gib > 0 and args.streams.scores_rejected:
        raise InputError(
            f"state_store_gib={args.state_store_gib}, but the rejected stream (rejected_weight={args.rejected_weight})"
            " reads the target's keys and values of a text, which are not kept. Set one of them to 0."
        )
    if args.state_store_gib == 0 and (args.state_store_dir or args.state_store_dtype):
        raise InputError(
            "state_store_dir and state_store_dtype say how states are kept, but state_store_gib=0 keeps none. Set it."
        )
    if (args.rollout_source == "server") != (args.server_url is not None):
        raise InputError(
            f"rollout_source={args.rollout_source!r} and server_url="
            f"{args.server_url and redact_url(args.server_url)!r} do not go together: a server is asked "
            "if and only if both name it. Set both, or neither."
        )
    _check_reload(args)
    if args.replay_ratio > 0 and args.replay_buffer_size == 0:
        raise InputError(
            f"replay_ratio={args.replay_ratio} draws from a buffer of size 0. Set replay_buffer_size above 0."
        )
    if args.replay_by_loss and args.replay_ratio == 0:
        raise InputError("replay_by_loss=True, but replay_ratio=0 draws nothing. Set replay_ratio above 0.")
    if args.anchors == "random" and not args.any_on_policy:
        raise InputError(
            "anchors='random' says where on-policy blocks start, but lmbda=0 (SFT) has none; its own anchors are "
            "random anyway. Leave anchors at 'exposed', or set lmbda above 0."
        )
    if args.anchors == "random" and args.replay_ratio > 0:
        raise InputError(
            f"replay_ratio={args.replay_ratio} draws positions that verification exposed, but anchors='random' "
            "exposes none. Set replay_ratio to 0, or anchors to 'exposed'."
        )
    if args.dpace_alpha is not None:
        _check_dpace(args)
    if args.replay_ratio > 0 and not args.any_on_policy:
        raise InputError("lmbda=0 (SFT) exposes no error positions for replay_ratio > 0 to draw. Set one of them.")
    if args.sample_proposals and args.sampling.greedy:
        raise InputError("sample_proposals=True needs temperature > 0; at 0 proposals are the drafter's argmax.")
    if args.optim == MUON and args.optim_args:
        raise InputError(
            f"optim_args={args.optim_args!r} is for optimizers of transformers, and optim='muon' takes none. Leave it "
            "out, or choose another optim."
        )
    if args.use_liger_kernel:
        raise InputError(
            "use_liger_kernel=True patches the models that Liger knows, and a drafter is none. Leave it off."
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise InputError(
                f"`accelerator_config` sets {name}, but the trainer lays its batches out itself. Leave it out."
            )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise InputError(
            "dataloader_persistent_workers=True keeps workers alive, but dataloader_num_workers=0 starts none. "
            "Set dataloader_num_workers above 0, or leave persistent workers off."
        )


def _check_dpace(args: Any) -> None:
    for name in ("accepted_decay", "sft_decay"):
        if getattr(args, name) not in (None, 1.0):
            raise InputError(
                f"{name}={getattr(args, name)} and dpace_alpha={args.dpace_alpha} both weigh the slots of a block. "
                "Leave one of them out."
            )
    if args.accepted_loss == "accepted_length":
        raise InputError(
            f"accepted_loss='accepted_length' weighs slots as dpace_alpha={args.dpace_alpha} does, by its gradient. "
            "Leave dpace_alpha out, or choose another loss."
        )


def _check_reload(args: Any) -> None:
    """The settings that hand the drafter to a server: one without the other, or a command that is not there."""
    steps, command = args.server_reload_steps, args.server_reload_command
    shown = repr(command and printable(command))
    if (steps is None) != (command is None) or (steps is not None and args.rollout_source != "server"):
        raise InputError(
            f"server_reload_steps={steps}, server_reload_command={shown} and rollout_source="
            f"{args.rollout_source!r} do not go together: every so many steps the command has the server that writes "
            "the texts load the drafter. Set both, and rollout_source='server', or neither."
        )
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"server_reload_command={shown} cannot be read ({error}). Correct its quotes.") from error
    if not words or shutil.which(words[0]) is None:
        raise InputError(
            f"server_reload_command={shown} names no program that can be run. Give its path, and for more than "
            "one command a script."
        )
