"""A training step on tensors that have shapes and no data: what each part of it holds at its fullest.

Its phases call what a run calls (speculation, [`BatchMaker`], [`draft_loss`], the optimizer), so what they
hold follows the code, and no formula here knows an architecture. Knows no clock, and not what its sizes are for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from ..core.errors import InputError
from ..core.records import DraftBlocks, ReplayBatch, Rollout, num_valid_slots
from ..core.shapes import Shapes, tensor_bytes
from ..core.target import Target
from ..decoding.speculation import Lanes, SpeculationSettings, commit, prefill, propose, verify
from ..drafters import DRAFTERS
from ..folders.target_folder import target_class
from .batching import BatchMaker
from .config import DraftOPDConfig
from .error_buffer import ErrorBuffer
from .loading import add_adapter
from .losses import draft_loss
from .optim import optimizer_of


class _PackedLinear(nn.Module):
    """Stands for a bitsandbytes layer: packed weights, unpacked whole for each product."""

    def __init__(self, linear: nn.Linear, bytes_per_weight: float) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        packed = torch.empty(math.ceil(self.shape.numel() * bytes_per_weight), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, inputs.new_empty(self.shape), self.bias)


def _bytes_per_weight(quantization: BitsAndBytesConfig | dict[str, Any]) -> float:
    """Of a linear layer; 4-bit weights have a scale a block of 64, of 4 bytes, or of 1 where it is quantised too."""
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("load_in_8bit"):
        return 1.0
    if settings.get("load_in_4bit"):
        return 0.5 + (1 if settings.get("bnb_4bit_use_double_quant") else 4) / 64
    raise InputError(
        f"The target's quantization_config {quantization} is not bitsandbytes' 8- or 4-bit, the only ones a plan is "
        "made for. Plan with the config of the unquantised target."
    )


def target_model(config: PreTrainedConfig) -> nn.Module:
    """A target in `config.dtype`, its linear layers packed where `config.quantization_config` says so."""
    quantization = getattr(config, "quantization_config", None)
    config = copy.deepcopy(config)
    config.quantization_config = None
    config._attn_implementation = "sdpa"
    made = target_class(config)
    # Auto classes and models call it differently.
    from_config = getattr(made, "from_config", None) or made._from_config
    with no_init_weights():  # some draw until values fit (SigLIP, of Gemma 3), which those without data never do
        model = from_config(config, dtype=config.dtype or torch.float32)
    if quantization is not None:
        size, head = _bytes_per_weight(quantization), model.get_output_embeddings()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and child is not head:
                    setattr(module, name, _PackedLinear(child, size))
    return model


class Rehearsal:
    """
    A training step on tensors without data, phase by phase: the bytes that each part holds at its fullest.

    Args:
        target_config ([`~transformers.PreTrainedConfig`]): With `dtype`, and `quantization_config` if there is one.
        drafter_config ([`~transformers.PreTrainedConfig`]): Of a kind in `DRAFTERS`.
        args ([`DraftOPDConfig`]): Settings.
        prompt_length (`int`, *optional*): Longest prompt in tokens; `args.max_prompt_length` by default.
        drafter_dtype (`torch.dtype`): Of its parameters.
        acceptance_length (`float`): τ assumed; 1 gives the most blocks a text can have.
        make_optimizer (`Callable`, *optional*): Parameters → optimizer; `args.optim` by default.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapter that is trained in the drafter's place.
        live ([`Shapes`], *optional*): What it runs under, where more than bytes is to be counted.

    Raises:
        `ValueError`: No prompt length is known, or the target's quantisation or the drafter's kind is not.
    """

    def __init__(
        self,
        target_config: PreTrainedConfig,
        drafter_config: PreTrainedConfig,
        args: DraftOPDConfig,
        prompt_length: int | None = None,
        drafter_dtype: torch.dtype = torch.float32,
        acceptance_length: float = 1.0,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        peft_config: PeftConfig | None = None,
        live: Shapes | None = None,
    ) -> None:
        prompt_length = args.max_prompt_length if prompt_length is None else prompt_length
        if prompt_length is None:
            raise InputError("max_prompt_length is unset, so nothing bounds a step's memory. Set it to plan.")
        self.args, self.make_optimizer = args, make_optimizer
        self.prompt_length, self.acceptance_length = prompt_length, acceptance_length
        self.length, self.batch_size = prompt_length + args.max_completion_length, args.per_device_train_batch_size
        drafter_class = {known.config_class: known for known in DRAFTERS.values()}.get(type(drafter_config))
        if drafter_class is None:
            name = type(drafter_config).__name__
            raise InputError(f"{name} is the config of no drafter; the kinds known are {sorted(DRAFTERS)}.")
        self.live = live or Shapes()
        with self.live:
            self.target = Target(target_model(target_config))
            self.drafter = drafter_class(copy.deepcopy(drafter_config)).bind(self.target)
            for parameter in self.drafter.parameters():
                parameter.data = parameter.data.to(drafter_dtype)
            self.model = self.drafter
            if peft_config is not None:
                # PyTorch cannot move parameters without data, and PEFT would, to where they are.
                with patch.object(nn.Module, "to", lambda module, *_, **__: module):
                    self.model = add_adapter(self.drafter, copy.deepcopy(peft_config))
        # transformers before 5.23 has the older name alone, of the setting and of the method.
        if getattr(args, "activation_checkpointing", args.gradient_checkpointing):
            if hasattr(self.drafter, "activation_checkpointing_enable"):
                self.drafter.activation_checkpointing_enable()
            else:
                self.drafter.gradient_checkpointing_enable()
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        new_texts = self.batch_size * args.steps_per_generation
        self.lanes = args.rollout_batch_size if args.eval_strategy != "no" else min(args.rollout_batch_size, new_texts)
        self.lambdas = {args.lmbda, args.lmbda if args.lmbda_end is None else args.lmbda_end}
        speculates = args.rollout_source == "speculation" and args.any_on_policy
        # Whether every batch is made of blocks that speculation has just drafted, so that none is looked for.
        self.always_fresh = speculates and args.steps_per_generation == args.gradient_accumulation_steps
        slots = len(self._exposed(self.batch_size, acceptance_length).blocks) * self.drafter.num_draft_tokens
        kept = slots * args.steps_per_generation * self.target.hidden_size * self.target.dtype.itemsize
        self.kept_states = kept if speculates and args.streams.scores_rejected else 0

    def _exposed(self, num_texts: int, acceptance_length: float) -> Rollout:
        """Texts with the blocks that verification exposes, each verdict committing as many tokens."""
        num_draft_tokens, last = self.drafter.num_draft_tokens, self.length - 1
        anchors = torch.arange(self.prompt_length, last, min(acceptance_length, num_draft_tokens + 1)).long()
        num_valid = num_valid_slots(anchors, torch.tensor(self.length), num_draft_tokens)
        num_accepted = torch.minimum(anchors.diff(append=torch.tensor([last])) - 1, num_valid)
        tokens = torch.zeros((num_texts, self.length), dtype=torch.long)
        # Apart, so that the error buffer takes each for another. Every argmax is 0, so 1 rejects every proposal.
        tokens[:, 0] = torch.arange(num_texts)
        text = int(self.args.streams.scores_rejected)
        tokens[:, self.prompt_length :] = text
        lengths = torch.full((num_texts,), self.length)
        blocks = DraftBlocks(
            torch.arange(num_texts).repeat_interleave(len(anchors)),
            anchors.repeat(num_texts),
            # Never the text: what a drafter reads of its own, beside the text, is then the most.
            anchors.new_full((num_texts * len(anchors), num_draft_tokens), 1 - text),
            num_accepted.repeat(num_texts),
            num_valid.repeat(num_texts),
        )
        return Rollout(tokens, torch.full_like(lengths, self.prompt_length), lengths, blocks)

    def weights(self) -> dict[str, int]:
        """Bytes of both models."""
        models = {"target weights": self.target.model, "drafter weights": self.model}
        return {name: tensor_bytes([*model.parameters(), *model.buffers()]) for name, model in models.items()}

    @torch.no_grad()
    def rollout(self) -> dict[str, int]:
        """Texts being written: a prefill of every lane, then a round at full length."""
        args = self.args
        drafter = self.drafter if args.rollout_source != "generate" or args.eval_strategy != "no" else None
        settings = SpeculationSettings(args.max_completion_length, [], args.sampling, args.sample_proposals)
        with self.live as live:
            start = live.begin()
            lanes = Lanes(self.target, drafter, settings, self.lanes, self.prompt_length)
            index = torch.arange(self.lanes)
            prompts = index.new_zeros((self.lanes, self.prompt_length))
            prefill(lanes, index, prompts, torch.full_like(index, self.prompt_length), index)
            parts = {"target's KV cache": tensor_bytes(lanes.cache.tensors())}
            parts["drafting state"] = live.live - start - parts["target's KV cache"]
            lanes.lengths[:] = self.length - 1
            proposals = propose(lanes, self.length - 1)
            commit(lanes, proposals, verify(lanes, proposals))
            work = live.peak - start - sum(parts.values())
        # Behind the last round the kept states are laid together and put in order.
        return {**parts, **self._kept(), "activations and logits": max(work, 2 * self.kept_states)}

    @torch.no_grad()
    def prepare(self) -> tuple[list[ReplayBatch], dict[str, int]]:
        """The last batch of an optimizer step being made, while the others wait; of proposals, of text or of both."""
        args, streams = self.args, self.args.streams
        # Where blocks are left over and only accepted slots teach, fewer and longer blocks teach more.
        spread = 1.0 if streams.scores_rejected else (args.max_completion_length - 1) / args.num_anchors
        texts = self._exposed(self.batch_size, max(self.acceptance_length, spread))
        accepting = replace(texts, tokens=torch.zeros_like(texts.tokens), blocks=None)
        # Whether a remembered text is drawn is chance.
        on_policy = replace(args.on_policy, replay_ratio=float(math.ceil(args.replay_ratio)))
        remembered = self._exposed(max(self.batch_size, int(on_policy.replay_ratio)), 1.0)
        buffer = ErrorBuffer(len(remembered))
        buffer.add(remembered, remembered.blocks)
        calls = []
        if max(self.lambdas) > 0:
            calls.append((texts, 1.0, True))
            if not self.always_fresh:
                # Blocks are looked for where all are accepted: that takes the fewest rounds and holds as much.
                calls.append((accepting, 1.0, False))
        if min(self.lambdas) < 1:
            calls.append((accepting, 0.0, False))
        batches, work = [], 0
        with self.live as live:
            if self.always_fresh and self.kept_states:
                shape = (*texts.blocks.draft_tokens.shape, self.target.hidden_size)
                texts.block_states = torch.empty(shape, dtype=self.target.dtype)
            proposals = args.sampling if args.sample_proposals else None
            make = BatchMaker(self.target, self.drafter, streams, on_policy, 0, buffer, proposals)
            for rollout, lmbda, fresh in calls:
                start = live.begin()
                (batch,), _ = make([rollout], 0, lmbda, fresh)
                work = max(work, live.peak - start - _batch_bytes(batch))
                if fresh or lmbda == 0:
                    batches.append(batch)
                del batch
        return batches, {**self._waiting(batches), **self._kept(), "the target's pass, replay and scoring": work}

    def train(self, batches: list[ReplayBatch]) -> dict[str, int]:
        """The drafter forward and backward, on the batch that takes most."""
        work = 0
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        parts = {**self._waiting(batches), "gradients": tensor_bytes(self.trainable)}
        self.model.train()
        for batch in batches:
            self.model.zero_grad()
            with self.live as live:
                start = live.begin()
                if self.args.gradient_accumulation_steps > 1:
                    self._fill_gradients()
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = draft_loss(self.drafter, self.target, batch, self.args.losses)["loss"]
                loss.backward()
                work = max(work, live.peak - start - parts["gradients"])
                del loss
        return {**parts, "drafter activations and loss chunks": work}

    def update(self, batches: list[ReplayBatch]) -> tuple[int, dict[str, int]]:
        """Optimizer state in bytes, and what its step holds beside it."""
        parts = {**self._waiting(batches), "gradients": tensor_bytes(self.trainable)}
        make, options = self.make_optimizer, {}
        if make is None:
            if "8bit" in self.args.optim:
                # bitsandbytes runs on no tensors without data: two moments of a byte, a float32 scale a block of 256.
                return round(2 * (1 + 4 / 256) * sum(map(torch.numel, self.trainable))), parts
            make, options = optimizer_of(self.args)
        with self.live as live:
            self._fill_gradients()
            start = live.begin()
            optimizer = make(self.trainable, **options)
            torch.nn.utils.clip_grad_norm_(self.trainable, self.args.max_grad_norm or 1.0)
            optimizer.step()
            return live.live - start, {**parts, "clipping and the optimizer's step": live.peak - live.live}

    def _fill_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)

    def _waiting(self, batches: list[ReplayBatch]) -> dict[str, int]:
        """What lies ready for the step: features, target states and blocks of every micro-batch."""
        size = max(map(_batch_bytes, batches))
        return {"features and target states of the step": self.args.gradient_accumulation_steps * size}

    def _kept(self) -> dict[str, int]:
        return {"kept verification states": self.kept_states} if self.kept_states else {}


def _batch_bytes(batch: ReplayBatch) -> int:
    values = [*vars(batch).values(), *vars(batch.blocks).values()]
    return tensor_bytes(value for value in values if isinstance(value, torch.Tensor))
