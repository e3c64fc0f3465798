"""A training step on fake tensors, which have shapes and no data, and the count of bytes alive while it runs.

Its phases call the package's own code, so what they hold follows the code, and no formula here knows an architecture.
Knows no texts, no clock, and not what the sizes are for.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, Trainer

from .config import DraftOPDConfig
from .divergences import LossSettings
from .drafters import DRAFTERS, Drafter
from .errors import InputError
from .losses import Heads, batch_loss
from .records import DraftBlocks, ReplayBatch, Rollout
from .replay import Coupling, draft_at, read_text
from .sampling import Chooser, probabilities
from .sampling_params import SamplingParams
from .target import Target
from .verification import verify_greedy, verify_sampled


aten = torch.ops.aten


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors of which none shares memory with another."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _tensors(record: object) -> list[torch.Tensor]:
    values = [getattr(record, field.name) for field in fields(record)]
    return [value for value in values if isinstance(value, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of tensors made under it that are still alive, and their peak.

    Where fake tensors are asked for values, the answer is: every condition holds, items spread evenly over rows, and a
    given share of a mask's cells is chosen.

    Args:
        held (`Iterable[torch.Tensor]`, *optional*): Tensors that are there already and do not count.
        chosen (`float`, *optional*, defaults to `1.0`): The share.
    """

    def __init__(self, held: Iterable[torch.Tensor] = (), chosen: float = 1.0) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.chosen = chosen
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in held)
        self._count = 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = self._answer(func, args, kwargs or {})
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size

    def _answer(self, func, args, kwargs):
        if func is aten._local_scalar_dense.default:
            return self._count
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func is aten.nonzero.default:
            return args[0].new_empty((self._cells(args[0]), args[0].dim()), dtype=torch.long)
        if func is aten.bincount.default:
            # Rows of a grid: the next number asked for is its width.
            rows, _, num_rows = args
            self._count = math.ceil(rows.numel() / num_rows)
            return rows.new_empty(num_rows)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [part for index in args[1] for part in self._without_masks(index)], *args[2:])
        return func(*args, **kwargs)

    def _cells(self, mask: torch.Tensor) -> int:
        return math.ceil(mask.numel() * self.chosen)

    def _without_masks(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        if index is None or index.dtype != torch.bool:
            return [index]
        return [index.new_empty(self._cells(index), dtype=torch.long) for _ in range(index.dim())]


class _PackedLinear(nn.Module):
    """Stands for a bitsandbytes layer: packed weights, unpacked whole for each product."""

    def __init__(self, linear: nn.Linear, bytes_per_weight: float) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        packed = torch.empty(math.ceil(self.shape.numel() * bytes_per_weight), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, inputs.new_empty(self.shape), self.bias)


def _bytes_per_weight(quantization: BitsAndBytesConfig | dict[str, Any]) -> float | None:
    """Of a linear layer; 4-bit weights have a scale a block of 64, of 4 bytes, or of 1 where it is quantised too."""
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("load_in_8bit"):
        return 1.0
    if settings.get("load_in_4bit"):
        return 0.5 + (1 if settings.get("bnb_4bit_use_double_quant") else 4) / 64
    return None


def fake_target(config: PreTrainedConfig) -> Target:
    """
    A target without weights, in `config.dtype`, its linear layers packed where `config.quantization_config` says so.

    Raises:
        `ValueError`: A quantisation other than bitsandbytes'.
    """
    quantization = getattr(config, "quantization_config", None)
    config = copy.deepcopy(config)
    config.quantization_config = None
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    if quantization is not None:
        size = _bytes_per_weight(quantization)
        if size is None:
            raise InputError(
                f"The target's quantization_config {quantization} is not bitsandbytes' 8- or 4-bit, the only ones a "
                "plan is made for. Plan with the config of the unquantised target."
            )
        head = model.get_output_embeddings()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and child is not head:
                    setattr(module, name, _PackedLinear(child, size))
    return Target(model)


def _class_of(config: PreTrainedConfig) -> type[Drafter]:
    for drafter_class in DRAFTERS.values():
        if drafter_class.config_class is type(config):
            return drafter_class
    raise InputError(f"{type(config).__name__} is the config of no drafter; the kinds known are {sorted(DRAFTERS)}.")


class Rehearsal:
    """
    A training step on fake tensors. Make and use it under `FakeTensorMode()`.

    Args:
        target_config ([`~transformers.PreTrainedConfig`]): With `dtype`, and `quantization_config` if there is one.
        drafter_config ([`~transformers.PreTrainedConfig`]): Of a kind in `DRAFTERS`.
        args ([`DraftOPDConfig`]): Settings.
        prompt_length (`int`): Longest prompt.
        drafter_dtype (`torch.dtype`): Of its parameters.
        autocast (`torch.dtype`, *optional*): What the drafter's forward pass in training is cast to.
        acceptance_length (`float`): τ assumed; 1 gives the most blocks a text can have.
        make_optimizer (`Callable`, *optional*): Parameters → optimizer; `args.optim` by default.
    """

    def __init__(
        self,
        target_config: PreTrainedConfig,
        drafter_config: PreTrainedConfig,
        args: DraftOPDConfig,
        prompt_length: int,
        drafter_dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        acceptance_length: float = 1.0,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        self.args, self.autocast, self.make_optimizer = args, autocast, make_optimizer
        with LiveBytes():
            self.target = fake_target(target_config)
            self.drafter = _class_of(drafter_config)(copy.deepcopy(drafter_config)).bind(self.target)
        for parameter in self.drafter.parameters():
            parameter.data = parameter.data.to(drafter_dtype)
        if args.activation_checkpointing:
            self.drafter.activation_checkpointing_enable()
        self.trainable = [parameter for parameter in self.drafter.parameters() if parameter.requires_grad]
        completions = args.max_completion_length
        self.prompt_length, self.length = prompt_length, prompt_length + completions
        self.rows = args.per_device_train_batch_size * (1 + math.ceil(args.replay_ratio))
        new_texts = args.per_device_train_batch_size * args.steps_per_generation
        self.slots = args.rollout_batch_size if args.eval_strategy != "no" else min(args.rollout_batch_size, new_texts)
        self.verified = math.ceil((completions - 1) / acceptance_length)
        shares = (args.lmbda, args.lmbda if args.lmbda_end is None else args.lmbda_end)
        self.drafted = max(shares) > 0
        self.any_anchor = min(shares) < 1 or args.on_policy.anchors == "random" or args.replay_ratio > 0
        self.blocks_per_row = min(args.num_anchors, completions - 1 if self.any_anchor else self.verified)
        self.sampling = SamplingParams(args.temperature, args.top_k, args.top_p)
        self.scores = args.rejected_weight > 0
        self.keeps_states = self.scores and self.drafted and args.rollout_source == "speculation"
        serves_one_step = args.steps_per_generation == args.gradient_accumulation_steps
        self.always_fresh = args.rollout_source == "speculation" and serves_one_step and not self.any_anchor

    def _live(self, held: Iterable[torch.Tensor] = (), chosen: float = 1.0) -> LiveBytes:
        modules = (self.target.model, self.drafter)
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return LiveBytes([*weights, *held], chosen)

    def _teaching(self) -> float:
        """Share of the slots that a stream reads, at most."""
        args, num_draft_tokens = self.args, self.drafter.num_draft_tokens
        if self.any_anchor or args.streams.whole_blocks:
            return 1.0
        if self.scores:
            # The first rejected slot is in both streams, every other one in one of them.
            return (num_draft_tokens + 1) / (2 * num_draft_tokens)
        # The accepted slots of consecutive anchors do not overlap.
        return min(1.0, (args.max_completion_length - 1) / (self.blocks_per_row * num_draft_tokens))

    def _blocks(self, per_row: int) -> DraftBlocks:
        rows = torch.zeros(self.rows * per_row, dtype=torch.long)
        proposals = rows.new_zeros((len(rows), self.drafter.num_draft_tokens))
        return DraftBlocks(rows, rows.clone(), proposals, rows.clone(), rows.clone())

    def weights(self) -> dict[str, int]:
        """Bytes of both models."""
        models = {"target weights": self.target.model, "drafter weights": self.drafter}
        return {name: tensor_bytes([*model.parameters(), *model.buffers()]) for name, model in models.items()}

    @torch.no_grad()
    def rollout(self) -> dict[str, int]:
        """Texts being written: a prefill of every slot, then a round at full length."""
        target, with_drafter = self.target, self.args.rollout_source != "generate" or self.args.eval_strategy != "no"
        num_draft_tokens = self.drafter.num_draft_tokens if with_drafter else 0
        layer_ids = self.drafter.target_layer_ids if with_drafter else ()
        size = self.length + num_draft_tokens + 1
        rows = torch.zeros(self.slots, dtype=torch.long)
        with self._live() as live:
            tokens = rows.new_zeros((self.slots, size))
            cache = target.new_cache(self.slots, size)
            state = self.drafter.start(self.slots, size) if with_drafter else None
            drafting = live.live
            positions = torch.arange(self.prompt_length).expand(self.slots, -1)
            features, states = target.forward_cached(
                tokens[:, : self.prompt_length], positions, cache, self.prompt_length, layer_ids, rows
            )
            probabilities(target.logits(states[rows, rows]), self.sampling)
            if with_drafter:
                self.drafter.extend(state, features, positions, tokens[rows], rows)
            del features, states
            caches = tensor_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
            self._round(tokens, cache, state, layer_ids, num_draft_tokens)
        parts = {"target's KV cache": caches, "drafting state": drafting}
        parts["activations and logits"] = live.peak - caches - drafting
        if self.keeps_states:
            parts["kept verification states"] = self._kept_states()
        return parts

    def _round(self, tokens, cache, state, layer_ids, num_draft_tokens) -> None:
        """Propose, verify, commit at the end of the longest text."""
        target, anchors = self.target, tokens[:, :1]
        draft_tokens, draft_probs = anchors[:, :0], None
        if state is not None:
            choose = Chooser(self.sampling if self.args.sample_proposals else None)
            proposal = self.drafter.propose(state, anchors, anchors, self.length, choose)
            draft_tokens = proposal.tokens[:, 0]
            draft_probs = None if proposal.probs is None else proposal.probs[:, 0]
        positions = anchors + torch.arange(num_draft_tokens + 1)
        inputs = torch.cat([anchors, draft_tokens], dim=1)
        features, states = target.forward_cached(inputs, positions, cache, tokens.shape[1], layer_ids)
        logits = target.logits(states)
        if self.sampling.greedy:
            verify_greedy(draft_tokens, logits.argmax(-1))
        else:
            verify_sampled(draft_tokens, draft_probs, probabilities(logits, self.sampling))
        if state is not None:
            self.drafter.extend(state, features, positions, tokens)

    def _kept_states(self) -> int:
        """States of every verification: the rounds' own, laid together, and put in order."""
        texts = self.args.per_device_train_batch_size * self.args.steps_per_generation
        slots = texts * self.verified * self.drafter.num_draft_tokens
        return 3 * slots * self.target.hidden_size * self.target.dtype.itemsize

    @torch.no_grad()
    def prepare(self) -> tuple[ReplayBatch, dict[str, int]]:
        """The last batch of an optimizer step being made, while the others wait."""
        target, drafter, num_draft_tokens = self.target, self.drafter, self.drafter.num_draft_tokens
        with self._live() as live:
            tokens = torch.zeros((self.rows, self.length), dtype=torch.long)
            lengths = tokens[:, 0]
            texts = Rollout(tokens, lengths, lengths)
            cache = target.new_cache(*tokens.shape) if self.scores and not self.always_fresh else None
            features, states = target.forward_text(tokens, drafter.target_layer_ids, cache)
            if self.drafted and not self.always_fresh:
                self._replay(texts, features, states)
            blocks = self._blocks(self.blocks_per_row)
            if self.scores:
                if cache is not None:
                    # One chunk stands for all: the rehearsal's blocks are all rejected at once.
                    target.score_blocks(tokens, self._blocks(min(self.blocks_per_row, 64)), cache)
                # States on the text, states behind it, and the two together; kept ones are chosen and joined before.
                shape = (len(blocks), num_draft_tokens, target.hidden_size)
                draft_states = [states.new_empty(shape) for _ in range(5 if self.always_fresh else 3)][0]
            weights = torch.zeros((len(blocks), num_draft_tokens))
            batch = ReplayBatch(
                tokens=tokens,
                lengths=lengths,
                features=features,
                blocks=blocks,
                labels=blocks.draft_tokens,
                states=states,
                draft_states=draft_states if self.scores else None,
                accepted_weights=weights,
                rejected_weights=weights.clone(),
                denominator=torch.zeros(()),
            )
        size = tensor_bytes(_tensors(batch))
        parts = self._waiting(size)
        parts["the target's pass, replay and scoring"] = live.peak - size
        return batch, parts

    def _waiting(self, batch_bytes: int) -> dict[str, int]:
        """What lies ready for the step: features, target states and blocks of every micro-batch."""
        parts = {"features and target states of the step": self.args.gradient_accumulation_steps * batch_bytes}
        if self.keeps_states:
            parts["kept verification states"] = self._kept_states() // 3
        return parts

    def _replay(self, texts: Rollout, features: torch.Tensor, states: torch.Tensor) -> None:
        coupling = None
        if self.args.sample_proposals:
            uniforms = torch.zeros((*texts.tokens.shape, self.drafter.num_draft_tokens, 2))
            coupling = Coupling(self.target, states, self.sampling, uniforms)
        state = read_text(self.drafter, texts, features[texts.lengths])
        anchors = texts.tokens[:, : self.args.num_chains]
        draft_at(self.drafter, state, texts, anchors, anchors == 0, coupling)

    def train(self, batch: ReplayBatch) -> dict[str, int]:
        """The drafter forward and backward."""
        args = self.args
        heads = Heads.of(self.drafter, self.target)
        loss = {"beta": args.beta, "max_clamp": args.loss_max_clamp, "log_prob_min_clamp": args.log_prob_min_clamp}
        accepted, rejected = (
            LossSettings(kind, args.teacher_temperature, **loss) for kind in (args.accepted_loss, args.rejected_loss)
        )
        self.drafter.train()
        with self._live([*_tensors(batch), *_tensors(batch.blocks)], self._teaching()) as live:
            if args.gradient_accumulation_steps > 1:
                self._fill_gradients()
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                hidden = self.drafter.draft(batch.features, batch.tokens, batch.blocks)
                losses = batch_loss(hidden, batch, heads, accepted, rejected, args.loss_chunk_size)
            losses["loss"].backward()
        parts = self._waiting(tensor_bytes(_tensors(batch)))
        parts["gradients"] = tensor_bytes(self.trainable)
        parts["drafter activations and loss chunks"] = live.peak - parts["gradients"]
        return parts

    def _fill_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)

    def update(self, batch: ReplayBatch) -> tuple[int, dict[str, int]]:
        """Optimizer state in bytes, and what its step holds beside it."""
        parts = self._waiting(tensor_bytes(_tensors(batch)))
        parts["gradients"] = tensor_bytes(self.trainable)
        self._fill_gradients()
        make, options = self.make_optimizer, {}
        if make is None:
            if "8bit" in self.args.optim:
                return _eight_bit_state(self.trainable), parts
            make, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
        optimizer = make(self.trainable, **options)
        with LiveBytes([*self.trainable, *(parameter.grad for parameter in self.trainable)]) as live:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.args.max_grad_norm or 1.0)
            optimizer.step()
        parts["clipping and the optimizer's step"] = live.peak - live.live
        return live.live, parts


def _eight_bit_state(parameters: list[nn.Parameter]) -> int:
    """Two moments of bitsandbytes' 8-bit Adam: a byte a weight and a scale a block of 256; 32 bits where small."""
    sizes = [parameter.numel() for parameter in parameters]
    return sum(2 * (size + 4 * math.ceil(size / 256)) if size >= 4096 else 8 * size for size in sizes)
