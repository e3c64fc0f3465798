"""Train the pocket target from nothing, with checkpoints that a killed run resumes from."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tasks import stream
from tokenizer import VOCAB_SIZE, build_tokenizer
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


POOL = 64  # Batches that are drawn, sorted by length and shuffled together.
THINK_OFF_SHARE = 0.1  # Share of the examples with the empty think block, so that `enable_thinking=False` works.
# Copying first: it forms the look-up heads that every kind needs, from more signal a token than the others give.
COPY_SHARE, COPY_POOLS = 0.5, 10
MATRIX_LR, OTHER_LR = 4e-3, 4e-3
WARMUP = 60


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of two million parameters with random weights."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, problem: dict, thinking: bool = True) -> tuple[list[int], int]:
    """Token ids of a chat with its answer and a stop token, and how many of them are the prompt."""
    messages = [{"role": "user", "content": problem["prompt"]}]
    options = {} if thinking else {"enable_thinking": False}
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(problem["answer_text"], add_special_tokens=False)
    return [*prompt_ids, *answer_ids, tokenizer.eos_token_id], len(prompt_ids)


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; the prompt and the padding carry no loss."""
    length = max(len(ids) for ids, _ in rows)
    inputs = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for i, (ids, prompt_length) in enumerate(rows):
        inputs[i, : len(ids)] = torch.tensor(ids)
        labels[i, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return inputs, labels


def batches(tokenizer: PreTrainedTokenizerFast, batch_size: int, start: int, seed: int) -> Iterator[tuple]:
    """Endless training batches from batch number ``start``; the n-th batch does not depend on where one starts."""
    pool_index, skip = divmod(start, POOL)
    while True:
        rng, source = random.Random(f"{seed}-{pool_index}"), stream("train", seed=seed * 100_000 + pool_index)
        copying = stream("train", seed=-1 - pool_index, kinds=["quote"])
        share = COPY_SHARE if pool_index < COPY_POOLS else 0.0
        problems = [next(copying if rng.random() < share else source) for _ in range(POOL * batch_size)]
        rows = [encode(tokenizer, problem, rng.random() >= THINK_OFF_SHARE) for problem in problems]
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks[skip:]:
            yield collate(chunk, tokenizer.pad_token_id)
        pool_index, skip = pool_index + 1, 0


def completion_loss(model: Qwen3ForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens; the head runs on those positions only."""
    # Right padding needs no mask: under causal attention no answer token sees it.
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    keep = targets != -100
    return F.cross_entropy(model.lm_head(hidden[keep]).float(), targets[keep])


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def schedule(step: int, progress: float) -> float:
    """Short warm-up, a plateau, then linear to zero over the last 60 %."""
    return min(1.0, (step + 1) / WARMUP, (1 - progress) / 0.6)


def save_atomically(state: dict, path: Path) -> None:
    """A run killed while it writes must find the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the target as users load it: bf16 weights, generation config and tokenizer in one folder."""
    rounded = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_target(args) -> None:
    """Train for ``args.steps`` steps, resume from ``args.work_dir`` after a cut, export to ``args.target``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(device).train()
    optimizers = build_optimizers(model)
    checkpoint = Path(args.work_dir) / "target.pt"
    step, tokens, seconds = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["run"] != [args.batch_size, args.seed]:
            raise ValueError(f"{checkpoint} is of another run ({state['run']}: batch size, seed); remove it")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters on {device}, step {step} of {args.steps}", flush=True)
    begun, begun_tokens, saved_at, average = time.time(), tokens, time.time(), None
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=5)
    for inputs, labels in batches(tokenizer, args.batch_size, step, args.seed):
        # On a machine that is busy with other work the minutes run out first; the rate then falls with them.
        spent = seconds + time.time() - begun
        progress = max(step / args.steps, spent / (60 * args.minutes))
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, progress)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not args.fp32):
            loss = completion_loss(model, inputs.to(device), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int((inputs != tokenizer.pad_token_id).sum())
        bar.update(1)
        if step % 20 == 0:
            average = loss.item() if average is None else 0.8 * average + 0.2 * loss.item()
            speed = (tokens - begun_tokens) / (time.time() - begun)
            bar.set_postfix_str(f"loss {average:.4f}, {speed:,.0f} tokens/s", refresh=False)
        if step == args.steps or time.time() - saved_at > args.save_seconds:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": states, "step": step, "tokens": tokens}
            save_atomically({**state, "seconds": spent, "run": [args.batch_size, args.seed]}, checkpoint)
            export(model, tokenizer, Path(args.work_dir) / "target-latest")
            saved_at = time.time()
    bar.close()
    export(model, tokenizer, Path(args.target))
    spent = seconds + time.time() - begun
    print(f"{tokens:,} tokens in {spent:,.0f} s, {tokens / spent:,.0f} tokens/s; target in {args.target}", flush=True)
