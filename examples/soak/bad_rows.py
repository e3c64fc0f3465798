"""Data files of which a row or the whole cannot be trained on; and odd but harmless rows that must come out right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from verdicts import Input
from world import folder_of, world

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer
from draft_opd_trl.texts.rows import load_prompts


USER = {"role": "user", "content": "What is 1+2?"}
JUNK: tuple[Any, ...] = (
    None,
    "",
    [],
    {},
    3,
    0.5,
    True,
    [None],
    [[]],
    [3],
    ["x"],
    [{}],
    [[USER]],
    {"x": 1},
    [{"role": 1}],
)
BAD_PROMPTS = (
    [{"role": 1}],
    *(value for value in JUNK if value != ""),
    "",
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 3}],
    [{"role": "user", "content": [3]}],
    [{"role": "nobody", "content": "x"}],
    [{"role": 3, "content": "x"}],
    [USER, None],
    [USER, "x"],
    [USER, {"role": "assistant", "content": "3"}],
    [{"role": "assistant", "content": "3"}],
)
# Without "7", which `datasets` reads as 7 where it stands beside numbers.
BAD_IDS = (
    *(value for value in JUNK if value != [3]),
    [-1],
    [10**6],
    [10**30],
    [0.5],
    [True, False],
    [7, None],
    [[7]],
    [7] * 5000,
    {"7": 7},
)
BAD_LINES = (
    "{",
    '{"prompt": }',
    "x",
    "[1, 2]",
    "3",
    '{"prompt": "a"} {"prompt": "b"}',
    "\x00",
    '{"prompt": "\\ud800"}',
)
BAD_FILES = (b"", b"\n\n", b"null", b"[]", b"{}", b"\xff\xfe\x00", b"PK\x03\x04", b"[" * 100_000, b'{"x": 1}\n' * 3)


def _tokens(messages: Any) -> list[int]:
    if isinstance(messages, str):
        return world().tokenizer(messages)["input_ids"]
    options = {"add_generation_prompt": True, "return_dict": True}
    return world().tokenizer.apply_chat_template(messages, **options)["input_ids"]


def _use(file: Path, content: bytes, source: str, expected: list[list[int]] | None) -> str | None:
    file.write_bytes(content)
    config = DraftOPDConfig(
        str(file.with_suffix("")),
        rollout_source=source,
        report_to="none",
        per_device_train_batch_size=1,
        max_completion_length=8,
        max_prompt_length=256,
    )
    dataset = load_prompts(str(file))
    tokenizer = world().tokenizer
    trainer = DraftOPDTrainer(
        folder_of("dflash"), world().model, config, train_dataset=dataset, processing_class=tokenizer
    )
    found = [list(ids) for ids in trainer.train_dataset["prompt_ids"]]
    if expected is None:
        return f"accepted as prompt_ids {found[:3]}"
    return None if found == expected else f"prompt_ids {found[:3]}, not {expected[:3]}"


def rows(scratch: str, draws: Random) -> Iterator[Input]:
    """A JSONL file each."""
    while True:
        good = draws.sample(world().messages, draws.randint(1, 6))
        place = draws.randrange(len(good))
        way = draws.choice(("prompt", "prompt", "prompt_ids", "completion", "completion_ids", "line", "file", "odd"))
        source, expected, told = "speculation", None, [f"Row {place}", f"row {place}", f"line {place + 1}"]
        table: list[Any] = [{"prompt": prompt} for prompt in good]
        if way == "prompt":
            table[place] = {"prompt": draws.choice(BAD_PROMPTS)}
        elif way == "prompt_ids":
            table = [{"prompt_ids": _tokens(prompt)} for prompt in good]
            table[place] = {"prompt_ids": draws.choice(BAD_IDS)}
        elif way == "completion":
            source, written = "dataset", [{"role": "assistant", "content": "3"}]
            table = [{"prompt": prompt, "completion": written} for prompt in good]
            table[place]["completion"] = draws.choice([value for value in JUNK if value != "x"])
        elif way == "completion_ids":
            source, table = "dataset", [{"prompt_ids": _tokens(prompt), "completion_ids": [40, 41]} for prompt in good]
            table[place]["completion_ids"] = draws.choice([ids for ids in BAD_IDS if ids != [7] * 5000])
        elif way == "odd":
            text = draws.choice(("ä€𐍈", "\u202e", "a\u0000b", " " * 50, "\r\n", "<|endoftext|>", "{{ x }}", "x" * 100))
            table[place] = {"prompt": [{"role": "user", "content": text}]}
            expected = [_tokens(row["prompt"]) for row in table]
        lines = [json.dumps(row) for row in table]
        if way == "line":
            lines[place] = draws.choice(BAD_LINES)
        content = draws.choice(BAD_FILES) if way == "file" else "\n".join(lines).encode(errors="surrogatepass")
        file = Path(scratch, f"{draws.randrange(2**32)}.jsonl")
        told += [str(file)] if way in ("line", "file") else []
        told += ["columns"] if way == "file" else []
        told = [*told, "prompt", "completion"] if len(good) == 1 else told
        shown = f"{source}, {way} in row {place} of {len(good)}: {content[:300]!r}"
        if way not in ("line", "file"):
            shown = f"{source}, {way}, row {place} of {len(good)}: {lines[place][:300]}"

        def act(file=file, content=content, source=source, expected=expected) -> str | None:
            return _use(file, content, source, expected)

        yield Input("rows", shown, act, told)
