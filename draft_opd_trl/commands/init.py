"""Make a new drafter for a target, ready to train: mask token, taps, shape, draft vocabulary, and a start.

It starts from the target's last layers, or with --from where another drafter stands: one of the same kind is copied
once it is known to fit, others if the kind can start from them. No line of Python is needed, and no texts but where a
draft vocabulary is counted.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import InputError
from .options import read_chat_kwargs, settle_options


def _assignment(value: str) -> str | None:
    name, equals, given = value.partition("=")
    return None if name.strip() and equals and given.strip() else "must be name=value, such as block_size=8"


@dataclass
class InitArguments:
    """For which target, and what."""

    target: str = field(metadata={"help": "What it will draft for: path or id."})
    kind: str = field(metadata={"help": "Kind of drafter, such as dflash, eagle3, dspark, causal_lm."})
    output_dir: str = field(metadata={"help": "New folder."})
    from_drafter: str | None = field(
        default=None,
        metadata={
            "help": "Start from this drafter (path or id), or for causal_lm from this small language model.",
            "aliases": ["--from"],
        },
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: the mask token must not occur there; and whose answers a draft vocabulary is counted in."
        },
    )
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of its config, as name=value: block_size=8 num_hidden_layers=2."},
    )
    num_prompts: int = field(default=512, metadata={"help": "Prompts the target answers, for a draft vocabulary."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest of these answers."})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON passed to the chat template."})
    seed: int = field(default=0, metadata={"help": "Of weights that start at random."})

    def __post_init__(self) -> None:
        settle_options(self, set=_assignment)


ARGUMENTS = (InitArguments,)


def run(arguments: InitArguments) -> dict[str, Any]:
    from dataclasses import asdict

    from ..training.new_drafter import new_drafter

    chat = read_chat_kwargs(arguments.chat_template_kwargs)
    made = new_drafter(
        arguments.target,
        arguments.kind,
        arguments.output_dir,
        from_drafter=arguments.from_drafter,
        prompts=arguments.prompts,
        options=read_options(arguments.set),
        chat_template_kwargs=chat,
        num_prompts=arguments.num_prompts,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    drafter, config = made.drafter, made.drafter.config
    return {
        "output_dir": arguments.output_dir,
        "kind": drafter.kind,
        "target": arguments.target,
        "num_parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "start": made.start,
        "num_draft_tokens": drafter.num_draft_tokens,
        "target_layer_ids": drafter.target_layer_ids,
        **{name: getattr(config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")},
        "mask_token": None if made.mask_token is None else asdict(made.mask_token),
        "draft_vocab_size": getattr(config, "draft_vocab_size", config.vocab_size),
        "coverage": None if made.vocabulary is None else made.vocabulary.coverage,
        "notes": made.notes,
        "train": _commands(arguments, chat),
    }


def read_options(words: list[str]) -> dict[str, Any]:
    """
    Options of a config, as `name=value`: a number, true, false, a list in brackets, or text.

    Raises:
        `ValueError`: One of them twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, value = (part.strip() for part in word.split("=", 1))
        if name in options:
            raise InputError(f"--set gives {name} twice. Give it once.")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _commands(arguments: InitArguments, chat: dict[str, Any]) -> list[str]:
    """
    What trains the drafter. One that has learnt nothing yet proposes nothing that is accepted, and there is nothing to
    replay: it learns from random places of the text first, which the target meanwhile writes faster alone.
    """
    name = arguments.output_dir.rstrip("/")
    pair = ["--teacher", arguments.target, "--dataset_name", arguments.prompts or "PROMPTS.jsonl"]
    pair += ["--chat_template_kwargs", json.dumps(chat)] if chat else []
    stages = [[name, *pair, "--output_dir", f"{name}-opd"]]
    if not arguments.from_drafter:
        texts = ["--text_cache_dir", f"{name}-texts"]
        sft = [name, *pair, "--output_dir", f"{name}-sft", *texts, "--rollout_source", "generate", "--lmbda", "0"]
        stages = [sft, [f"{name}-sft", *pair, "--output_dir", f"{name}-opd", *texts]]
    return [shlex.join(["draft-opd", "train", "--model", *words]) for words in stages]


def show(result: dict[str, Any]) -> str:
    from ..core.terminal import as_text, grid

    mask, size, whole = result["mask_token"], result["draft_vocab_size"], result["vocab_size"]
    covered = "" if result["coverage"] is None else f", {result['coverage']:.2%} of what the target wrote"
    lines = {
        "parameters": f"{result['num_parameters']:,}",
        "starts from": result["start"],
        "proposes": f"{result['num_draft_tokens']} tokens a block",
        "layers": f"{result['num_hidden_layers']}, of width {result['hidden_size']}",
        "reads": f"the outputs of target layers {', '.join(map(str, result['target_layer_ids']))}, counted from 0",
        "mask token": "" if mask is None else f"{mask['id']} ({mask['token'] or 'no token'}), {mask['why']}",
        "vocabulary": f"all {whole} tokens" if size == whole else f"{size} of {whole} tokens{covered}",
    }
    if not result["target_layer_ids"]:
        lines["reads"] = "the text alone"
    shown = grid([["", name, text] for name, text in lines.items() if text])
    head = f"{result['output_dir']}: a new {result['kind']} drafter for {result['target']}"
    stages = ["Train it with"] if len(result["train"]) == 1 else ["Train it by SFT, then by Draft-OPD, with"]
    return as_text(head, shown, *(f"Note: {note}" for note in result["notes"]), "", *stages, *result["train"])
