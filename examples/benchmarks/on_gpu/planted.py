"""
Targets and drafters of public shapes with random weights, whose texts and acceptance are known.

A random drafter is never right about a random target, and then neither replay nor speculation costs what it costs over
models that are trained. So both are planted: the target, whose layers compute what they always do and add next to
nothing, repeats its last token; what the drafter computes is replaced by that token in as many slots as are to be
accepted, and by another in the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from paper import TARGETS
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from draft_opd_trl import Target, create_drafter
from draft_opd_trl.core.stopwatch import Stopwatch
from draft_opd_trl.drafters import Drafter


END, OTHER, FIRST_WORD = 1, 2, 3  # a token that ends texts and one that is always wrong; the rest are in prompts


@dataclass(frozen=True)
class Size:
    """
    How large everything is.

    Args:
        targets (`dict[str, PreTrainedConfig]`): By name; the first is what most parts take.
        drafters (`dict[str, dict]`): Options of `create_drafter` by kind, without the mask token.
        draft_vocabulary (`int`): Tokens that EAGLE-3 can propose.
        prompt_length, completion_length, texts, blocks (`int`): Of a step: tokens, texts a batch, most blocks a text.
        steps (`int`): Timed steps of each arm.
        new_tokens (`int`): Longest text of the part on decoding.
        batches (`tuple[int, ...]`): Texts decoded side by side.
        grown (`dict[str, tuple[int, ...]]`): Values of each setting, the others as they are.
        kinds (`tuple[str, ...]`): Kinds of drafters whose invariants are looked at.
        world_steps, world_prompts, world_tokens (`int`): Most steps towards a τ, prompts that it is measured on, and
            longest completion.
        compiler (`str`): Backend of `torch.compile`.
    """

    targets: dict[str, PreTrainedConfig]
    drafters: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"dflash": {"block_size": 16}, "eagle3": {"num_draft_tokens": 7}}
    )
    draft_vocabulary: int = 32_000
    prompt_length: int = 128
    completion_length: int = 1920
    texts: int = 4
    blocks: int = 384  # as many as a completion exposes at τ = 5
    steps: int = 3
    new_tokens: int = 256
    batches: tuple[int, ...] = (1, 8, 32)
    grown: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "max_completion_length": (512, 1024, 2048, 4096),
            "num_anchors": (64, 128, 256, 384),
            "per_device_train_batch_size": (1, 2, 4, 8),
        }
    )
    kinds: tuple[str, ...] = ("dflash", "eagle3", "dspark", "causal_lm")
    world_steps: int = 400
    world_prompts: int = 128
    world_tokens: int = 512
    compiler: str = "inductor"


TINY = Size(
    targets={
        name: Qwen3Config(
            vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, dtype=torch.float32,
            tie_word_embeddings=False,
        )
        for name, width in (("Qwen3-4B", 64), ("Qwen3-8B", 96))
    },
    drafters={
        "dflash": {"block_size": 8, "num_hidden_layers": 2, "target_layer_ids": [1, 2]},
        "eagle3": {"num_draft_tokens": 5, "target_layer_ids": [0, 1, 2]},
    },
    draft_vocabulary=256,
    prompt_length=6,
    completion_length=40,
    texts=2,
    blocks=8,
    steps=1,
    new_tokens=12,
    batches=(1, 2),
    grown={"max_completion_length": (20, 40), "per_device_train_batch_size": (1, 2)},
    kinds=("eagle3",),
    world_steps=2,
    world_prompts=2,
    world_tokens=24,
    compiler="eager",
)  # fmt: skip
SIZES = {"full": Size({name: TARGETS[name] for name in ("Qwen3-4B", "Qwen3-8B")}), "tiny": TINY}


def planted_target(config: PreTrainedConfig, device: torch.device) -> Target:
    """A target of random weights in `config.dtype`, which repeats its last token."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.generation_config.eos_token_id = END
    return Target(model)


def accepted_run(anchors: torch.Tensor) -> torch.Tensor:
    """Slots to be accepted after each anchor: 0, 2, 4, 6 or 8, so that τ is 5 in blocks of 9 tokens and more."""
    return 2 * (anchors % 5)


def planted_drafter(size: Size, kind: str, target: Target, dtype: torch.dtype = torch.float32) -> Drafter:
    """A drafter of random weights, right about [`accepted_run`] slots; native DFlash decoding finds it so too."""
    options = dict(size.drafters[kind])
    if kind == "eagle3":
        options["draft_token_ids"] = list(range(size.draft_vocabulary))
    else:
        options["mask_token_id"] = target.vocab_size - 1
    with torch.device(target.device):
        drafter = create_drafter(kind, target, init_from_target=False, **options).to(dtype).eval()
    propose, proposal_of, forward = drafter.propose, drafter.proposal_of, drafter.forward
    slots = torch.arange(drafter.num_draft_tokens, device=target.device)

    def planted_propose(state, tokens, anchors, limit, choose):
        right = slots < accepted_run(anchors)[..., None]
        if kind == "dflash":
            # Not the proposals: how many of them replay asks the head for hangs on the run.
            known = torch.where(
                right[..., None], target.embedding(tokens)[..., None, :], target.embedding.weight[OTHER]
            )
            drafter.proposal_of = lambda states, choose: proposal_of(known.to(states.dtype), choose)
            return propose(state, tokens, anchors, limit, choose)
        proposal = propose(state, tokens, anchors, limit, choose)
        proposal.tokens = torch.where(right, tokens[..., None], OTHER)
        return proposal

    def planted_forward(noise_embeds, context_hidden_states, position_ids, **options):
        output = forward(noise_embeds, context_hidden_states, position_ids, **options)
        anchors = position_ids[:, -drafter.config.block_size]
        right = (slots < accepted_run(anchors)[:, None])[..., None]
        wrong = target.embedding.weight[OTHER]
        # The target's head finds the token whose embedding a state is.
        output.last_hidden_state[:, 1:] = torch.where(right, noise_embeds[:, :1], wrong)
        return output

    drafter.propose = planted_propose
    if kind == "dflash":
        drafter.forward = planted_forward
    return drafter


def random_prompts(size: Size, count: int, length: int) -> list[list[int]]:
    """Prompts of tokens that every drafter can propose."""
    draws = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_WORD, size.draft_vocabulary, (count, length), generator=draws).tolist()


def planted_texts(size: Size, count: int, completion_length: int) -> Dataset:
    """Prompts with what a [`planted_target`] writes after them."""
    prompts = random_prompts(size, count, size.prompt_length)
    completions = [[prompt[-1]] * completion_length for prompt in prompts]
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": completions})


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Mean seconds of a call, of the device."""
    watch = Stopwatch(device)
    for _ in range(repeats):
        with watch.measure("run"):
            run()
    return watch.read()["run"] / repeats
