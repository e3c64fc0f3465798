"""Train the pocket target from nothing, with checkpoints that a killed run resumes from."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deltanet import hybrid_of
from tasks import stream
from tokenizer import VOCAB_SIZE, build_tokenizer
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draft_opd_trl.core.files import atomic_file


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


def batches(
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    start: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    copy_pools: int = COPY_POOLS,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless training batches from batch number ``start``; the n-th batch does not depend on where one starts.

    Yields a worker's share of the ids and labels, and the number of answer tokens in the whole batch.
    """
    pool_index, skip = divmod(start, POOL)
    while True:
        rng, source = random.Random(f"{seed}-{pool_index}"), stream("train", seed=seed * 100_000 + pool_index)
        copying = stream("train", seed=-1 - pool_index, kinds=["quote"])
        share = COPY_SHARE if pool_index < copy_pools else 0.0
        problems = [next(copying if rng.random() < share else source) for _ in range(POOL * batch_size)]
        rows = [encode(tokenizer, problem, rng.random() >= THINK_OFF_SHARE) for problem in problems]
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks[skip:]:
            count = sum(len(ids) - prompt_length for ids, prompt_length in chunk)
            yield *collate(chunk[rank::world], tokenizer.pad_token_id), count
        pool_index, skip = pool_index + 1, 0


def completion_loss(model: PreTrainedModel, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy over the answers' tokens; the head runs on those positions only."""
    # Right padding needs no mask: under causal attention no answer token sees it.
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    keep = targets != -100
    return F.cross_entropy(model.lm_head(hidden[keep]).float(), targets[keep], reduction="sum")


def build_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
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


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the target as users load it: bf16 weights, generation config and tokenizer in one folder."""
    rounded = type(model)(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reduce_gradients(model: PreTrainedModel, extra: list[float], world: int) -> list[float]:
    """Sum the gradients, and some numbers beside them, over the workers."""
    if world == 1:
        return extra
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(extra)])
    dist.all_reduce(flat)
    parts = flat.split([*(g.numel() for g in gradients), len(extra)])
    for gradient, part in zip(gradients, parts, strict=False):
        gradient.copy_(part.view_as(gradient))
    return parts[-1].tolist()


def train_target(args) -> None:
    """Train on the GPU, or on the CPU with one worker a core.

    Workers of one thread each meet once a step, where the threads of one process meet at every operation: for so
    small a model that is three times as fast, and it does not collapse when other programs need a core.
    """
    cuda = torch.cuda.is_available() and not args.cpu
    world = 1 if cuda else min(args.threads or os.cpu_count() or 1, args.batch_size)
    if world == 1:
        train_worker(0, 1, "", args)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_worker, args=(world, f"{folder}/meet", args), nprocs=world)


def train_worker(rank: int, world: int, meeting: str, args) -> None:
    """Train for ``args.steps`` steps, resume from ``args.work_dir`` after a cut, export to ``args.target``."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=Path(meeting).as_uri(), rank=rank, world_size=world)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    if args.hybrid_of:
        model = hybrid_of(Qwen3ForCausalLM.from_pretrained(args.hybrid_of, dtype=torch.float32))
    model = model.to(device).train()
    optimizers = build_optimizers(model)
    checkpoint = Path(args.work_dir) / "target.pt"
    step, tokens, spent, average = 0, 0, 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["run"] != [args.batch_size, args.seed]:
            raise ValueError(f"{checkpoint} is of another run ({state['run']}: batch size, seed); remove it")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, spent = state["step"], state["tokens"], state["seconds"]
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=5, disable=rank > 0)
    begun, begun_tokens, saved_at = time.time() - spent, tokens, spent
    begun_spent = spent
    # A model that stands on another has its look-up heads.
    shares = (rank, world, 0 if args.hybrid_of else COPY_POOLS)
    for inputs, labels, count in batches(tokenizer, args.batch_size, step, args.seed, *shares):
        # On a machine that is busy with other work the minutes run out first; the rate then falls with them.
        progress = max(step / args.steps, spent / (60 * args.minutes))
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, progress)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not args.fp32):
            loss = completion_loss(model, inputs.to(device), labels.to(device)) / count
        loss.backward()
        mine = [loss.item(), float((inputs != tokenizer.pad_token_id).sum()), (rank == 0) * (time.time() - begun)]
        value, seen, spent = reduce_gradients(model, mine, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int(seen)
        average = value if average is None else 0.98 * average + 0.02 * value
        bar.update(1)
        speed = (tokens - begun_tokens) / (spent - begun_spent)
        bar.set_postfix_str(f"loss {average:.4f}, {speed:,.0f} tokens/s", refresh=False)
        if rank == 0 and (step == args.steps or spent - saved_at > args.save_seconds):
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": states, "step": step, "tokens": tokens}
            # A run killed while it writes finds the previous checkpoint whole.
            with atomic_file(checkpoint) as part:
                torch.save({**state, "seconds": spent, "run": [args.batch_size, args.seed]}, part)
            export(model, tokenizer, Path(args.work_dir) / "target-latest")
            saved_at = spent
    bar.close()
    if rank == 0:
        export(model, tokenizer, Path(args.target))
        print(f"{tokens:,} tokens in {spent:,.0f} s, {tokens / spent:,.0f} tokens/s", flush=True)
