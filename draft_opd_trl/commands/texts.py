"""Turn the conversations that a server or a proxy has logged into rows to train on.

Reads .jsonl or .jsonl.gz files, a conversation a line: chat `messages`, a `request` beside its `response`, or a
`prompt` beside its `completion` or `response`. Each answer of the assistant that the target wrote becomes a row; the
target reads all of them, and what it would not have written is dropped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from .options import QuantizationArguments, read_chat_kwargs, settle_options


@dataclass
class TextsArguments:
    """Which logs, whose texts, and where rows go."""

    logs: list[str] = field(metadata={"help": "Logs, a JSON object a line.", "positional": True})
    target: str = field(metadata={"help": "Whose answers are kept: path or id.", "aliases": ["--teacher"]})
    output_file: str = field(metadata={"help": "Where rows go: a .jsonl file."})
    held_out: int = field(default=0, metadata={"help": "Conversations kept aside, to evaluate on."})
    temperature: float = field(default=0.0, metadata={"help": "What the answers were sampled at; 0 is greedy."})
    top_k: int = field(default=0, metadata={"help": "Top-k they were sampled with; 0 keeps all."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p they were sampled with."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts are dropped."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Longer answers are cut there."})
    dtype: str = field(default="float32", metadata={"help": "Of the target: float32, bfloat16, auto."})
    chat_template_kwargs: str = field(
        default="{}", metadata={"help": 'JSON for the chat template, such as {"enable_thinking": false}.'}
    )

    def __post_init__(self) -> None:
        settle_options(self)
        if not self.logs:
            raise InputError("`logs` is []; give at least one.")


ARGUMENTS = (TextsArguments, QuantizationArguments)


def run(arguments: TextsArguments, quantization: QuantizationArguments) -> dict[str, Any]:
    from accelerate import PartialState

    from ..core.files import check_writable
    from ..core.sampling_params import SamplingParams
    from ..core.target import stop_token_ids
    from ..texts.harvest import Harvest
    from ..texts.traffic import check_logs
    from ..training.loading import choose_pad_token, load_pair

    if PartialState().num_processes > 1:
        raise InputError("Logs are read in one process. Start it without `accelerate launch` or `torchrun`.")
    # What is small first: a wrong name must show before gigabytes are read.
    check_logs(arguments.logs)
    _check_output(arguments.output_file, arguments.logs)
    check_writable(Path(arguments.output_file).parent)
    chat = read_chat_kwargs(arguments.chat_template_kwargs)
    sampling = SamplingParams(arguments.temperature, arguments.top_k, arguments.top_p)
    _check_form(arguments.logs)
    target, _, tokenizer = load_pair([], arguments.target, arguments.dtype, quantization.quantization_config())
    stops = stop_token_ids(target.model, tokenizer)
    harvest = Harvest(
        target,
        tokenizer,
        sampling,
        stops,
        choose_pad_token(target.model, tokenizer, stops),
        chat,
        arguments.max_prompt_length,
        arguments.max_completion_length,
    )
    written = _write(harvest, arguments)
    asked = {key: getattr(arguments, key) for key in ("target", "temperature", "top_k", "top_p")}
    return {**asked, **written, **asdict(harvest.tally), "strangers": harvest.strangers()}


def _check_output(output: str, logs: list[str]) -> None:
    """
    Raises:
        `ValueError`: It is no name for rows, or that of a log.
    """
    if not output.endswith(".jsonl"):
        raise InputError(f"--output_file {output} does not end in .jsonl, and rows are JSON, one a line. Name it so.")
    if Path(output).resolve() in [Path(log).resolve() for log in logs]:
        raise InputError(f"--output_file {output} is one of the logs. Give another name.")


def _check_form(logs: list[str]) -> None:
    """
    Raises:
        `ValueError`: There is no answer in any line, which is known before the target is loaded.
    """
    from ..texts.traffic import Unusable, read_log, turns_of

    first = None
    for place, line in read_log(logs, lambda count: None):
        try:
            if isinstance(line, Unusable):
                raise line
            turns_of(line)
            return
        except Unusable as why:
            first = first or f"{place} is {why.reason}{f' ({why.detail})' if why.detail else ''}"
    raise InputError(
        f"{', '.join(logs)}: no answers in there ({first or 'no lines'}). A line is an object with `messages`, with "
        "`request` and `response`, or with `prompt` and `completion`."
    )


def _write(harvest: Any, arguments: TextsArguments) -> dict[str, Any]:
    """Rows into their files, which appear when all are written."""
    from contextlib import ExitStack

    from tqdm.auto import tqdm

    from ..core.files import atomic_file, writing
    from ..texts.harvest import HeldOut
    from ..texts.traffic import read_log

    output, aside = Path(arguments.output_file), HeldOut(arguments.held_out)
    held_file = output.with_name(f"{output.stem}-held_out.jsonl")
    size = sum(Path(log).stat().st_size for log in arguments.logs)
    longest = {"prompt": 0, "completion": 0}
    rows = 0
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc="Reading logs", leave=False))
        stack.enter_context(writing(output, "Give another --output_file."))
        file = stack.enter_context(stack.enter_context(atomic_file(output)).open("w", encoding="utf-8"))
        for row in harvest.rows(
            read_log(arguments.logs, bar.update), lambda kept: bar.set_postfix_str(f"{kept} rows", refresh=False)
        ):
            for ready in aside.sift(row):
                file.write(_line(ready))
                rows += 1
                longest["prompt"] = max(longest["prompt"], len(ready.prompt_ids))
                longest["completion"] = max(longest["completion"], len(ready.completion_ids))
        if not rows:
            raise InputError(_why_nothing(harvest, arguments))
        if arguments.held_out:
            held = stack.enter_context(stack.enter_context(atomic_file(held_file)).open("w", encoding="utf-8"))
            held.writelines(map(_line, aside.rows))
    return {
        "output_file": str(output),
        "rows": rows,
        "held_out_file": str(held_file) if arguments.held_out else None,
        "held_out_rows": len(aside.rows),
        "longest_prompt": longest["prompt"],
        "longest_completion": longest["completion"],
    }


def _line(row: Any) -> str:
    return json.dumps({"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids}) + "\n"


def _why_nothing(harvest: Any, arguments: TextsArguments) -> str:
    tally, found = harvest.tally, harvest.strangers()
    if tally.kept:
        return (
            f"Holding {arguments.held_out} conversations out leaves nothing to train on: there are {tally.kept} rows. "
            "Hold fewer out (--held_out), or give more logs."
        )
    reasons = ", ".join(f"{entry['count']} {reason}" for reason, entry in tally.dropped.items())
    told = f" {found}." if found else ""
    return (
        f"Of {tally.answers} answers none can be trained on ({reasons}).{told} Check that --target is the model that "
        "was served, and --temperature, --top_k, --top_p and --chat_template_kwargs what it was served with."
    )


def show(result: dict[str, Any]) -> str:
    from ..core.terminal import as_text, table

    lines = [["kept to train on", str(result["rows"]), ""]]
    if result["held_out_file"]:
        lines.append(["kept aside", str(result["held_out_rows"]), result["held_out_file"]])
    for reason, entry in sorted(result["dropped"].items(), key=lambda item: -item[1]["count"]):
        detail = f": {entry['detail']}" if entry["detail"] else ""
        lines.append([f"dropped: {reason}", str(entry["count"]), f"first at {entry['first']}{detail}"[:200]])
    parts = [
        f"{result['rows']} rows written to {result['output_file']}, of {result['answers']} answers in "
        f"{result['lines']} lines.",
        "",
        table(["answers", "number", ""], lines),
    ]
    if result["cut_short"]:
        parts.append(f"{result['cut_short']} of those kept were cut short, and got no stop token.")
    if result["strangers"]:
        parts.append(f"What was dropped as not the target's: {result['strangers']}.")
    law = "".join(f" --{key} {result[key]:g}" for key in ("temperature", "top_k") if result[key])
    law += f" --top_p {result['top_p']:g}" if result["top_p"] < 1 else ""
    parts += [
        "",
        "Train on them:",
        f"  draft-opd train --model DRAFTER --teacher {result['target']} --dataset_name {result['output_file']}"
        f" --rollout_source dataset{law} --max_prompt_length {result['longest_prompt']}"
        f" --max_completion_length {max(result['longest_completion'], 2)} --output_dir NEW",
    ]
    return as_text(*parts)
