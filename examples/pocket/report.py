"""Measure the target on held-out prompts, as users load it: bf16 weights read into float32."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from target import collate, encode
from tasks import KINDS, check_answer, problems
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def teacher_forced(model, tokenizer, rows: list[dict], batch_size: int) -> dict[str, float]:
    """Loss on the held-out answers, and entropy and top-1 probability of the target's distribution along them."""
    loss = entropy = top = count = 0.0
    for i in range(0, len(rows), batch_size):
        encoded = [encode(tokenizer, row) for row in rows[i : i + batch_size]]
        inputs, labels = (x.to(model.device) for x in collate(encoded, tokenizer.pad_token_id))
        keep = labels[:, 1:] != -100
        log_probs = F.log_softmax(model(input_ids=inputs).logits[:, :-1][keep].float(), dim=-1)
        probs = log_probs.exp()
        loss -= log_probs.gather(1, labels[:, 1:][keep][:, None]).sum().item()
        entropy -= (probs * log_probs).sum().item()
        top += probs.max(dim=-1).values.sum().item()
        count += keep.sum().item()
    return {"loss": loss / count, "entropy": entropy / count, "top1_probability": top / count}


@torch.no_grad()
def greedy(model, tokenizer, rows: list[dict], args, thinking: bool = True) -> list[tuple[list[int], bool]]:
    """Greedy completions as token ids without the stop token, and whether each one ended by a stop token."""
    stops, completions = set(model.generation_config.eos_token_id), []
    options = {} if thinking else {"enable_thinking": False}
    for i in tqdm(range(0, len(rows), args.batch_size), desc="greedy", unit="batch"):
        chats = [[{"role": "user", "content": row["prompt"]}] for row in rows[i : i + args.batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True, **options
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((k for k, token in enumerate(ids) if token in stops), None)
            completions.append((ids[:end], end is not None))
    return completions


def repeats(ids: list[int], size: int = 16) -> bool:
    """Whether a run of ``size`` tokens occurs three times: worked answers restate their state, so short runs do."""
    runs = Counter(tuple(ids[i : i + size]) for i in range(len(ids) - size + 1))
    return bool(runs) and max(runs.values()) >= 3


def valid_python(text: str) -> bool:
    """Whether the code block of an answer is there and compiles."""
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    try:
        return bool(code) and bool(compile(code[1], "answer", "exec"))
    except SyntaxError:
        return False


def write_report(args) -> None:
    """Print the figures and write them to ``report.json`` in the target's folder."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.target, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(device).eval()
    rows = problems("heldout", args.prompts)
    figures = {"prompts": len(rows), "parameters": model.num_parameters()}
    figures.update(teacher_forced(model, tokenizer, rows, args.batch_size))

    start = time.time()
    completions = greedy(model, tokenizer, rows, args)
    figures["greedy_seconds"] = time.time() - start
    texts = [tokenizer.decode(ids) for ids, _ in completions]
    right = [check_answer(row, text) for row, text in zip(rows, texts, strict=True)]
    by_kind = {kind: [ok for row, ok in zip(rows, right, strict=True) if row["kind"] == kind] for kind in KINDS}
    code = [valid_python(text) for row, text in zip(rows, texts, strict=True) if row["kind"] == "python"]
    lengths = [len(ids) for ids, _ in completions]
    figures["accuracy"] = sum(right) / len(right)
    figures["accuracy_by_kind"] = {kind: sum(oks) / len(oks) for kind, oks in by_kind.items() if oks}
    figures["python_compiles"] = sum(code) / max(len(code), 1)
    figures["ends_with_stop_token"] = sum(ended for _, ended in completions) / len(rows)
    figures["repeats_16_tokens_3_times"] = sum(repeats(ids) for ids, _ in completions) / len(rows)
    written = [repeats(tokenizer.encode(row["answer_text"])) for row in rows]
    figures["repeats_16_tokens_3_times_in_reference"] = sum(written) / len(rows)
    figures["mean_tokens"] = sum(lengths) / len(rows)
    figures["max_tokens"] = max(lengths)
    few = rows[: 8 * len(KINDS)]
    off = greedy(model, tokenizer, few, args, thinking=False)
    answers = [check_answer(row, tokenizer.decode(ids)) for row, (ids, _) in zip(few, off, strict=True)]
    figures["accuracy_thinking_off"] = sum(answers) / len(answers)

    for kind in KINDS:
        wrong = [i for i, row in enumerate(rows) if row["kind"] == kind and not right[i]]
        for i in wrong[: args.examples]:
            print(f"--- {kind}: {rows[i]['prompt']}\n--- answer {rows[i]['answer']}; written:\n{texts[i]}")
    print(json.dumps(figures, indent=2))
    with open(Path(args.target) / "report.json", "w", encoding="utf-8") as file:
        json.dump(figures, file, indent=2)
        file.write("\n")
