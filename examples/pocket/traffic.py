"""Fake traffic: a log such as a server of the pocket target leaves, with all that one finds in logs.

    python examples/pocket/traffic.py log.jsonl --count 64

Each prompt is answered by the target. Of every eight lines one is another model's, one comes twice, one was cut short,
one failed, and one is a conversation of two questions; the forms in which logs hold them take turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, speculate, stop_token_ids


POCKET = Path(__file__).resolve().parent


class Server:
    """The pocket target, as something that answers messages."""

    def __init__(self, max_new_tokens: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype="float32")
        self.target, self.tokenizer = Target(model), AutoTokenizer.from_pretrained(POCKET / "target")
        self.stops, self.max_new_tokens = stop_token_ids(model, self.tokenizer), max_new_tokens

    def answer(self, conversations: list[list[dict]], temperature: float = 0.0) -> list[dict]:
        """A choice for each conversation, as the chat API gives it."""
        prompts = self.tokenizer.apply_chat_template(conversations, add_generation_prompt=True)["input_ids"]
        law = SamplingParams(temperature)
        settings = SpeculationSettings(self.max_new_tokens, self.stops, law, batch_size=len(prompts))
        texts = speculate(self.target, None, prompts, settings, seeds=range(len(prompts))).completions()
        return [self.choice(ids) for ids in texts]

    def choice(self, ids: list[int]) -> dict:
        """A text as the chat API gives it."""
        return {
            "message": {"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)},
            "finish_reason": "stop" if ids[-1] in self.stops else "length",
        }


def _line(form: int, messages: list[dict], choice: dict) -> dict[str, Any]:
    """An answer as one of three kinds of logs has it."""
    if form == 0 or choice["finish_reason"] != "stop":
        return {"request": {"model": "pocket", "messages": messages}, "response": {"choices": [choice]}}
    if form == 1:
        return {"messages": [*messages, choice["message"]]}
    return {"prompt": messages, "response": choice["message"]["content"]}


def traffic(prompts: list[list[dict]], server: Server) -> list[dict[str, Any]]:
    """The lines of a log in which each prompt is asked once."""
    choices = server.answer(prompts)
    foreign = dict(zip(range(0, len(prompts), 8), server.answer(prompts[::8], temperature=2.0), strict=True))
    longer = [[*prompts[place], choices[place]["message"], *prompts[place - 1]] for place in range(4, len(prompts), 8)]
    later = dict(zip(range(4, len(prompts), 8), server.answer(longer) if longer else [], strict=True))
    lines = []
    for place, (messages, choice) in enumerate(zip(prompts, choices, strict=True)):
        line = _line(place % 3, messages, foreign.get(place, choice))
        if place % 8 == 2:
            ids = server.tokenizer(choice["message"]["content"])["input_ids"]
            line = _line(0, messages, server.choice(ids[: len(ids) // 2]))
        if place % 8 == 3:
            line = {"request": {"messages": messages}, "response": {"error": {"code": 503, "message": "overloaded"}}}
        if place % 8 == 4:
            line = _line(1, longer[place // 8], later[place])
        lines += [line, line] if place % 8 == 1 else [line]
    return lines


def main() -> None:
    """Write a log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="Where to write it: a .jsonl file.")
    parser.add_argument("--count", type=int, default=64, help="Prompts that are asked.")
    parser.add_argument("--skip", type=int, default=0, help="Prompts before them, which another log has.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Longest answer.")
    args = parser.parse_args()
    rows = (POCKET / "prompts" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows[args.skip : args.skip + args.count]]
    lines = traffic(prompts, Server(args.max_new_tokens))
    Path(args.log).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} lines written to {args.log}")


if __name__ == "__main__":
    main()
