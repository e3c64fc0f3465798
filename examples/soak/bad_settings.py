"""Settings that cannot be right, as Python values, words of a command line and YAML; and right ones in odd company."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from verdicts import Input
from world import POCKET, folder_of, world

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer, cli
from draft_opd_trl.core.errors import InputError
from draft_opd_trl.training.divergences import LOSSES


# Below, above and at what each field may be; [low, high), where None is unbounded. Types come from the annotations.
POSITIVE = (0, 1e15)
_FROM_ZERO, _SHARE, _FROM_ONE = (-1e-9, 1e15), (-1e-9, 1 + 1e-9), (1, 1e15)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lmbda", "lmbda_end", "beta", "rejected_decay", "accepted_decay", "top_p"), _SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "sft_decay", "dpace_alpha"), _SHARE),
    **dict.fromkeys(("temperature", "teacher_temperature", "accepted_weight", "rejected_weight"), _FROM_ZERO),
    **dict.fromkeys(("replay_ratio", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), _FROM_ZERO),
    **dict.fromkeys(("server_timeout", "adam_epsilon", "num_train_epochs", "loss_max_clamp"), POSITIVE),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(("top_k", "replay_buffer_size", "server_max_retries", "num_texts_to_check", "seed"), _FROM_ZERO),
    **dict.fromkeys(("data_seed", "dataloader_num_workers"), _FROM_ZERO),
    **dict.fromkeys(("num_anchors", "num_chains", "max_completion_length", "rollout_batch_size"), _FROM_ONE),
    **dict.fromkeys(("loss_chunk_size", "steps_per_generation", "regenerate_every", "server_concurrency"), _FROM_ONE),
    **dict.fromkeys(("num_completions_to_print", "max_prompt_length", "gradient_accumulation_steps"), _FROM_ONE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit"), _FROM_ONE),
}
FLAGS = (
    "sample_proposals truncate_prompts replay_by_loss disable_dropout shuffle_dataset log_completions "
    "bf16 fp16 push_to_hub load_best_model_at_end save_only_model eval_on_start"
).split()
WORDS = (
    "recipe rollout_source anchors accepted_loss rejected_loss optim lr_scheduler_type save_strategy eval_strategy "
    "logging_strategy hub_strategy log_level"
).split()
TEXTS = "output_dir text_cache_dir server_model server_token run_name hub_model_id".split()
TABLES = "model_init_kwargs teacher_model_init_kwargs chat_template_kwargs lr_scheduler_kwargs".split()
# Right values at the edges of what is right, to be drawn together.
EDGES: dict[str, tuple] = {
    "lmbda": (0.0, 0.5, 1.0),
    "lmbda_end": (None, 0.0, 1.0),
    "temperature": (0.0, 0.01, 0.7, 50.0),
    "teacher_temperature": (None, 0.0, 0.5, 10.0),
    "top_k": (0, 1, 5, 5000),
    "top_p": (1e-6, 0.5, 1.0),
    "sample_proposals": (False, True),
    "accepted_loss": (None, *LOSSES),
    "rejected_loss": (None, *LOSSES),
    "accepted_weight": (0.0, 1.0, 100.0),
    "rejected_weight": (0.0, 1.0, 100.0),
    "rejected_decay": (0.0, 1.0),
    "accepted_decay": (1e-6, 1.0),
    "sft_decay": (None, 1e-6, 1.0),
    "dpace_alpha": (None, 1e-6, 1.0),
    "anchors": ("exposed", "random"),
    "beta": (0.0, 0.5, 1.0),
    "loss_max_clamp": (None, 1e-3, 1e6),
    "log_prob_min_clamp": (None, -1e-3, -1e6),
    "num_anchors": (1, 3, 10_000),
    "num_chains": (1, 1000),
    "replay_buffer_size": (0, 1, 1000),
    "replay_ratio": (0.0, 0.5, 3.0),
    "replay_by_loss": (False, True),
    "loss_chunk_size": (16, 1_000_000),  # 1 is right too, but takes too long to train with
    "rollout_source": ("speculation", "generate", "dataset", "server"),
    "max_completion_length": (2, 3, 16),
    "max_prompt_length": (None, 1, 8, 512),
    "truncate_prompts": (False, True),
    "rollout_batch_size": (1, 64),
    "steps_per_generation": (None, 1, 2, 3),
    "gradient_accumulation_steps": (1, 2),
    "per_device_train_batch_size": (1, 3, 16),
    "learning_rate": (0.0, 1e-8, 1e-2),
    "max_grad_norm": (0.0, 1e-6, 1e6),
    "weight_decay": (0.0, 1.0),
    "recipe": ("default", "paper"),
}
NAMES = (*RANGES, *FLAGS, *WORDS, *TEXTS, *TABLES)


def _types(name: str) -> tuple:
    hint = typing.get_type_hints(DraftOPDConfig)[name]
    return typing.get_args(hint) or (hint,)


def bad_values(name: str) -> list[Any]:
    """Values that no reading makes right. Numbers as text, and 0 or 1 for a flag, are not among them."""
    types = _types(name)
    bad: list[Any] = [object(), b"x", [], {}, ["x"], {"x": 1}, {1, 2}, 1j, lambda: None]
    if name in TABLES:
        return [object(), b"x", [], ["x"], {1, 2}, 1j, 3, 0.5, "x", "{", "[1]", "3", math.nan, {1: 2}]
    if type(None) not in types and name not in ("output_dir", "bf16"):
        bad.append(None)
    if name in RANGES:
        low, high = RANGES[name]
        bad += [math.nan, math.inf, -math.inf, "x", "", "nan", -1, -0.5, 10**30, 1e300, -(10**30)]
        bad += [high + 1.0] if high < 10 else []
        bad += [0] if low in (0, 1) else []
        bad += [1.5] if float not in types else []
    elif name in FLAGS:
        bad += ["x", "", math.nan, 2, -1, 0.5]
    elif name in WORDS:
        bad += ["x", "", 3, math.nan, True]
    else:
        bad += [3, 0.5, math.nan, True, *(["a\0b"] if name.endswith("dir") else [])]
    return bad


def _shown(value: Any) -> str:
    return repr(value).split(" at 0x")[0]


def _given(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in given.items())


def _configured(scratch: str, given: dict[str, Any]) -> Input:
    def act() -> str:
        DraftOPDConfig(**{"output_dir": scratch, "report_to": "none", **given})
        return f"accepted {_given(given)}"

    return Input("settings", f"DraftOPDConfig({_given(given)})", act, [*given, *map(str, given.values())], quick=True)


def _run_command(words: list[str], run: bool, expected: str) -> str | None:
    """A command in this process; where it is not to run, its options are read and no more."""
    if not run:
        importlib.import_module(cli.COMMANDS[words[0]]).run = lambda *parsed: {"output_dir": ""}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
    except SystemExit as leave:
        lines = err.getvalue().splitlines()
        told = [line for line in lines if line.startswith("draft-opd: error: ")]
        if not leave.code or len(told) != 1 or lines[-1] != told[0] or out.getvalue():
            raise RuntimeError(f"exit code {leave.code}, stderr ends {lines[-2:]}") from None
        raise InputError(told[0]) from None
    return f"accepted {expected}"


BAD_TEXT = {
    "number": ["x", "nan", "inf", "-inf", "-1", "-0.5", "1e400", "", "[]", "1e30", "1,5"],
    "flag": ["x", "2", "", "nan"],
    "word": ["x", ""],
    "table": ["x", "{", "[1]", "3"],
}


def _textual(name: str) -> str:
    return {True: "number"}.get(name in RANGES) or ("flag" if name in FLAGS else "word" if name in WORDS else "table")


def _train_words(scratch: str) -> list[str]:
    pair = ["--model", folder_of("dflash"), "--teacher", str(POCKET / "target")]
    return ["train", *pair, "--dataset_name", str(POCKET / "prompts" / "heldout.jsonl"), "--output_dir", scratch]


def _option(scratch: str, draws: Random) -> Input:
    name = draws.choice([name for name in NAMES if name not in TEXTS])
    value = draws.choice(BAD_TEXT[_textual(name)])
    words = [*_train_words(scratch), f"--{name}={value}"]
    shown = f"draft-opd train ... {words[-1]}"
    return Input("command line", shown, lambda: _run_command(words, False, f"--{name}={value}"), [name], quick=True)


YAML = ["{name}: {value}", "{name}: [{value}", "- {name}", "{name}", "{name}: {value}\n  x: 1", "{name}: !!python/x 1"]


def _file(scratch: str, draws: Random) -> Input:
    name = draws.choice([name for name in NAMES if name not in TEXTS])
    value = draws.choice(BAD_TEXT[_textual(name)])
    text = draws.choice(YAML).format(name=name, value=json.dumps(value))
    file = Path(scratch, f"{draws.randrange(2**32)}.yaml")

    def act() -> str | None:
        file.write_text(text)
        return _run_command([*_train_words(scratch), "--config", str(file)], False, text)

    return Input("YAML", repr(text), act, [name, str(file)], quick=True)


def _train(scratch: str, given: dict[str, Any]) -> str | None:
    prompts = world().prompts[:32]
    rows = {"prompt_ids": prompts, "completion_ids": [[40, 41, 42, 2]] * len(prompts)}
    fixed = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    fixed |= {"max_completion_length": 12, "num_texts_to_check": 0, "rollout_batch_size": 16}
    if given.get("recipe") == "paper":
        fixed |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    config = DraftOPDConfig(scratch, **{**fixed, **given})
    dataset = Dataset.from_dict(rows)
    options = {"train_dataset": dataset, "processing_class": world().tokenizer}
    trainer = DraftOPDTrainer(folder_of("dflash-narrow"), world().model, config, **options)
    trainer.train()
    bad = [name for name, value in trainer.drafter.named_parameters() if not value.isfinite().all()]
    if bad:
        return f"weights are not finite: {bad[0]}"
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return None if all(map(math.isfinite, losses)) else f"losses {losses}"


def _combination(scratch: str, draws: Random, train: bool) -> Input:
    given = {name: draws.choice(EDGES[name]) for name in draws.sample(list(EDGES), draws.randint(2, 6))}
    if given.get("rollout_source") == "server":
        given["server_url"] = "http://127.0.0.1:9"
        given["server_max_retries"] = 0

    def act() -> str | None:
        torch.manual_seed(0)
        return _train(f"{scratch}/{draws.randrange(2**32)}", given) if train else _accepted(scratch, given)

    shown = f"{'training' if train else 'DraftOPDConfig'}({_given(given)})"
    return Input("combinations", shown, act, [*given, "completion_ids", "server"], quick=not train)


def _accepted(scratch: str, given: dict[str, Any]) -> None:
    config = DraftOPDConfig(**{"output_dir": scratch, "report_to": "none", **given})
    json.dumps(dataclasses.asdict(config), default=str)


def settings(scratch: str, draws: Random) -> Iterator[Input]:
    """Every field with every bad value once, in random order, and pairs of them for ever."""
    singles = [(name, value) for name in NAMES for value in bad_values(name)]
    draws.shuffle(singles)
    for name, value in singles:
        yield _configured(scratch, {name: value})
    while True:
        yield _configured(scratch, dict(draws.sample(singles, 2)))


def _endless(make: Callable[[], Input]) -> Iterator[Input]:
    while True:
        yield make()


def options(scratch: str, draws: Random) -> Iterator[Input]:
    return _endless(lambda: _option(scratch, draws))


def files(scratch: str, draws: Random) -> Iterator[Input]:
    return _endless(lambda: _file(scratch, draws))


def combinations(scratch: str, draws: Random) -> Iterator[Input]:
    """One in eight that is accepted also trains."""
    return _endless(lambda: _combination(scratch, draws, draws.random() < 0.125))


def commands(scratch: str, draws: Random) -> Iterator[Input]:
    """Whole commands, run for real, each with one word that cannot be right."""
    target, drafter = str(POCKET / "target"), folder_of("dflash")
    rows = str(POCKET / "prompts" / "heldout.jsonl")
    pair = {"--model": drafter, "--teacher": target}
    whole = {
        "train": {**pair, "--dataset_name": rows, "--max_steps": "1", "--num_eval_prompts": "1", "--output_dir": ""},
        "evaluate": {**pair, "--suite": rows, "--num_prompts": "1", "--max_new_tokens": "4", "--batch_size": "1"},
        "trace": {**pair, "--suite": rows, "--num_prompts": "1", "--max_new_tokens": "4", "--output_file": ""},
        "plan": {**pair, "--device_memory": "24"},
        "export": {"": drafter, "--output_dir": "", "--format": "dflash", "--target": target},
        "inspect": {"": drafter, "--target": target},
    }
    whole["train"] |= {"--max_completion_length": "4", "--per_device_train_batch_size": "1", "--report_to": "none"}
    whole["evaluate"] |= {"--temperature": "0", "--top_p": "1", "--top_k": "0", "--dtype": "float32", "--seed": "0"}
    folders = ["nowhere", "/dev/null", "a\nb", "..", "x" * 5000, "no/such/id", "https://x", ""]
    numbers = ["-1", "x", "", "nan", "1e30", "-0.5", "inf"]
    bad = {
        "--model": [*folders, target],
        "--teacher": [*folders, drafter],
        "--target": [*folders, drafter],
        "": [*folders, target],
        "--dataset_name": [*folders, rows + "x"],
        "--suite": [*folders, "gms8k", "pocket-nothing"],
        "--dtype": ["fp16", "x", "", "half", "int8"],
        "--format": ["x", "", "eagle3"],
        "--report_to": ["x", ""],
    }
    # −1 leaves the number of steps to the epochs.
    right = {("--max_steps", "-1")}
    while True:
        name = draws.choice(list(whole))
        place = draws.choice([option for option, value in whole[name].items() if value and option != "--report_to"])
        value = draws.choice([value for value in bad.get(place, numbers) if (place, value) not in right])
        fresh = f"{scratch}/{draws.randrange(2**32)}"
        given = {**{option: value or fresh for option, value in whole[name].items()}, place: value}
        words = [name, *([given.pop("")] if "" in given else [])]
        words += [word for option, value in given.items() for word in ((option, value) if value else (f"{option}=",))]
        shown = f"draft-opd {' '.join(words)}"[:600]
        told = place.strip("-").replace("model", "drafter") or "path"
        act = lambda words=words, place=place, value=value: _run_command(words, True, f"{place} {value}")  # noqa: E731
        yield Input("commands", shown, act, [place.strip("-") or "path", told, value[:40]])
