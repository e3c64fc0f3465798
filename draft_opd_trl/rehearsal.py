"""A training step on tensors that have shapes and no data, and the count of bytes alive while it runs.

Its phases call what a run calls (speculation, [`BatchMaker`], [`Drafter.draft`], losses, the optimizer), so what they
hold follows the code, and no formula here knows an architecture. Knows no clock, and not what its sizes are for.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, Trainer

from .batching import BatchMaker
from .config import DraftOPDConfig
from .drafters import DRAFTERS, Drafter
from .error_buffer import ErrorBuffer
from .errors import InputError
from .loading import add_adapter
from .losses import Heads, batch_loss
from .records import DraftBlocks, ReplayBatch, Rollout, num_valid_slots
from .speculation import Lanes, SpeculationSettings, commit, prefill, propose, verify
from .target import Target


aten = torch.ops.aten
# Cells of a tensor up to which whole numbers have values. Larger ones are attention masks and sorted vocabularies.
SMALL = 2**22


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; what several share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _held(batch: ReplayBatch) -> list[torch.Tensor]:
    values = [*vars(batch).values(), *vars(batch.blocks).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of tensors made under it that are still alive, and their peak.

    Args:
        held (`Iterable[torch.Tensor]`, *optional*): Tensors that are there already and do not count.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = self.run(func, args, kwargs or {})
        for tensor in _tensors(output):
            self._note(tensor.untyped_storage())
        return output

    def begin(self) -> int:
        """Bytes alive now, from which the peak is counted anew."""
        self.peak = self.live
        return self.live

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operation gives."""
        return func(*args, **kwargs)

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


class Shapes(LiveBytes):
    """
    [`LiveBytes`] under which numbers with a fraction have no data, and whole numbers and conditions do.

    So lengths, anchors and masks lead the code where they would lead it, into loops, indices and sizes, while weights,
    states and logits cost nothing. What is asked of those has one answer: conditions hold, whole numbers are 0, others
    are 1. A drafter's argmax is then the target's, and both are token 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = _tensors((args, kwargs))
        if func is aten._local_scalar_dense.default and isinstance(given[0], FakeTensor):
            return 1
        if func in (aten.equal.default, aten.allclose.default):
            return True
        in_place_or_view = any(value.alias_info is not None for value in func._schema.returns)
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **kwargs) if in_place_or_view else self._run_real(func, args, kwargs, given)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (args[0], [part for index in args[1] for part in _without_masks(index)], *args[2:])
        with self.fake:
            output = func(*args, **kwargs)
        if in_place_or_view:
            # What is written to keeps the values it has.
            return given[0] if func._schema.is_mutable and isinstance(output, torch.Tensor) else output
        return tree_map(_answer, output)

    def _run_real(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor]) -> Any:
        try:
            with self.fake:
                output = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        # Numbers with a fraction that nobody gave and nobody draws are weights and states, but for a single one.
        few = SMALL if given or kwargs.get("generator") is not None else 1
        limits = {tensor: few if tensor.is_floating_point() else SMALL for tensor in _tensors(output)}
        if any(tensor.numel() > limit for tensor, limit in limits.items()):
            return output
        return func(*args, **kwargs)


def _without_masks(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the indices of its cells; where they are many, of all of them."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
    return list(index.nonzero(as_tuple=True))


def _answer(value: Any) -> Any:
    if not isinstance(value, FakeTensor) or value.is_floating_point() or value.numel() > SMALL:
        return value
    return torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)


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
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    if quantization is not None:
        size, head = _bytes_per_weight(quantization), model.get_output_embeddings()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and child is not head:
                    setattr(module, name, _PackedLinear(child, size))
    return model


def drafter_class_of(config: PreTrainedConfig) -> type[Drafter]:
    for drafter_class in DRAFTERS.values():
        if drafter_class.config_class is type(config):
            return drafter_class
    raise InputError(f"{type(config).__name__} is the config of no drafter; the kinds known are {sorted(DRAFTERS)}.")


class Rehearsal:
    """
    A training step on tensors without data, phase by phase: the bytes that each part holds at its fullest.

    Args:
        target_config ([`~transformers.PreTrainedConfig`]): With `dtype`, and `quantization_config` if there is one.
        drafter_config ([`~transformers.PreTrainedConfig`]): Of a kind in `DRAFTERS`.
        args ([`DraftOPDConfig`]): Settings.
        prompt_length (`int`): Longest prompt.
        drafter_dtype (`torch.dtype`): Of its parameters.
        autocast (`torch.dtype`, *optional*): What the drafter's forward pass in training is cast to.
        acceptance_length (`float`): τ assumed; 1 gives the most blocks a text can have.
        make_optimizer (`Callable`, *optional*): Parameters → optimizer; `args.optim` by default.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapter that is trained in the drafter's place.
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
        peft_config: PeftConfig | None = None,
    ) -> None:
        self.args, self.autocast, self.make_optimizer = args, autocast, make_optimizer
        self.prompt_length, self.acceptance_length = prompt_length, acceptance_length
        self.length, self.batch_size = prompt_length + args.max_completion_length, args.per_device_train_batch_size
        self.live = Shapes()
        with self.live:
            model = target_model(target_config)
            self.drafter = drafter_class_of(drafter_config)(copy.deepcopy(drafter_config))
            for parameter in self.drafter.parameters():
                parameter.data = parameter.data.to(drafter_dtype)
            self.target = Target(model)
            self.drafter.bind(self.target)
            self.model = self.drafter if peft_config is None else add_adapter(self.drafter, peft_config)
        if args.activation_checkpointing:
            self.drafter.activation_checkpointing_enable()
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        new_texts = self.batch_size * args.steps_per_generation
        self.lanes = args.rollout_batch_size if args.eval_strategy != "no" else min(args.rollout_batch_size, new_texts)
        self.lambdas = {args.lmbda, args.lmbda if args.lmbda_end is None else args.lmbda_end}
        self.sampling, self.streams, self.losses = args.sampling, args.streams, args.losses
        # Whether a remembered text is drawn is chance.
        self.on_policy = replace(args.on_policy, replay_ratio=float(math.ceil(args.replay_ratio)))
        speculates = args.rollout_source == "speculation" and args.any_on_policy
        # Whether every batch is made of blocks that speculation has just drafted, so that none is replayed.
        once = args.steps_per_generation == args.gradient_accumulation_steps
        self.always_fresh = speculates and once and self.on_policy.anchors == "exposed"
        slots = len(self._exposed(self.batch_size).blocks) * self.drafter.num_draft_tokens
        kept = slots * args.steps_per_generation * self.target.hidden_size * self.target.dtype.itemsize
        self.kept_states = kept if speculates and self.streams.scores_rejected else 0

    def _exposed(self, num_texts: int, acceptance_length: float | None = None) -> Rollout:
        """Texts with the blocks that verification exposes, each verdict committing as many tokens."""
        acceptance_length = acceptance_length or self.acceptance_length
        num_draft_tokens, last = self.drafter.num_draft_tokens, self.length - 1
        anchors = torch.arange(self.prompt_length, last, min(acceptance_length, num_draft_tokens + 1)).long()
        num_valid = num_valid_slots(anchors, torch.tensor(self.length), num_draft_tokens)
        num_accepted = torch.minimum(anchors.diff(append=torch.tensor([last])) - 1, num_valid)
        texts = torch.arange(num_texts).repeat_interleave(len(anchors))
        drafted = texts.new_zeros((len(texts), num_draft_tokens))
        per_text = (values.repeat(num_texts) for values in (anchors, num_accepted, num_valid))
        anchors, num_accepted, num_valid = per_text
        tokens = torch.zeros((num_texts, self.length), dtype=torch.long)
        # Apart, so that the error buffer takes each for another. A drafter's argmax is 0, so 1 rejects every proposal.
        tokens[:, 0] = torch.arange(num_texts)
        tokens[:, self.prompt_length :] = int(self.streams.scores_rejected)
        lengths = torch.full((num_texts,), self.length)
        blocks = DraftBlocks(texts, anchors, drafted, num_accepted, num_valid)
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
        settings = SpeculationSettings(args.max_completion_length, [], self.sampling, args.sample_proposals)
        with self.live as live:
            start = live.begin()
            lanes = Lanes(self.target, drafter, settings, self.lanes, self.prompt_length)
            drafting = live.live - start
            index = torch.arange(self.lanes)
            prompts = index.new_zeros((self.lanes, self.prompt_length))
            prefill(lanes, index, prompts, torch.full_like(index, self.prompt_length), index)
            caches = tensor_bytes(tensor for layer in lanes.cache.layers for tensor in (layer.keys, layer.values))
            lanes.lengths[:] = self.length - 1
            proposals = propose(lanes, self.length - 1)
            commit(lanes, proposals, verify(lanes, proposals))
            parts = {"target's KV cache": caches, "drafting state": drafting}
            parts["activations and logits"] = live.peak - start - caches - drafting
        # Behind the last round they are laid together and put in order.
        parts["activations and logits"] = max(parts["activations and logits"], 2 * self.kept_states)
        return parts | self._kept()

    @torch.no_grad()
    def prepare(self) -> tuple[list[ReplayBatch], dict[str, int]]:
        """The last batch of an optimizer step being made, while the others wait; of each sort one."""
        args, scores = self.args, self.streams.scores_rejected
        # Where blocks are left over and only accepted slots teach, fewer and longer blocks teach more.
        spread = 1.0 if scores else (args.max_completion_length - 1) / args.num_anchors
        texts = self._exposed(self.batch_size, max(self.acceptance_length, spread))
        with self.live as live:
            if self.always_fresh and self.kept_states:
                shape = (*texts.blocks.draft_tokens.shape, self.target.hidden_size)
                texts.block_states = torch.empty(shape, dtype=self.target.dtype)
            accepting = replace(texts, tokens=torch.zeros_like(texts.tokens), blocks=None, block_states=None)
            buffer = ErrorBuffer(max(self.batch_size, int(self.on_policy.replay_ratio)))
            remembered = self._exposed(buffer.size, 1.0)
            buffer.add(remembered, remembered.blocks)
            proposals = self.sampling if args.sample_proposals else None
            make = BatchMaker(self.target, self.drafter, self.streams, self.on_policy, 0, buffer, proposals)
            calls = []
            if max(self.lambdas) > 0:
                # Blocks are looked for where all are accepted, which takes the fewest rounds and holds as much.
                calls += [] if self.always_fresh or self.on_policy.anchors == "random" else [(accepting, 1.0, False)]
                calls += [(texts, 1.0, True)]
            if min(self.lambdas) < 1:
                calls += [(accepting, 0.0, False)]
            batches, work = [], 0
            for rollout, lmbda, fresh in calls:
                start = live.begin()
                (batch,), _ = make([rollout], 0, lmbda, fresh)
                work = max(work, live.peak - start - tensor_bytes(_held(batch)))
                if rollout is texts or lmbda == 0:
                    batches.append(batch)
                del batch
        return batches, {**self._waiting(batches), **self._kept(), "the target's pass, replay and scoring": work}

    def _kept(self) -> dict[str, int]:
        return {"kept verification states": self.kept_states} if self.kept_states else {}

    def _waiting(self, batches: list[ReplayBatch]) -> dict[str, int]:
        """What lies ready for the step: features, target states and blocks of every micro-batch."""
        size = max(tensor_bytes(_held(batch)) for batch in batches)
        return {"features and target states of the step": self.args.gradient_accumulation_steps * size}

    def train(self, batches: list[ReplayBatch]) -> dict[str, int]:
        """The drafter forward and backward, on the batch that takes most."""
        args, gradients, work = self.args, tensor_bytes(self.trainable), 0
        self.model.train()
        for batch in batches:
            self.model.zero_grad()
            with self.live as live:
                start = live.begin()
                if args.gradient_accumulation_steps > 1:
                    self._fill_gradients()
                with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                    hidden = self.drafter.draft(batch.features, batch.tokens, batch.blocks)
                    heads, losses = Heads.of(self.drafter, self.target), self.losses
                    loss = batch_loss(hidden, batch, heads, losses.accepted, losses.rejected, losses.chunk_size)[
                        "loss"
                    ]
                loss.backward()
                work = max(work, live.peak - start - gradients)
                del hidden, loss
        parts = {**self._waiting(batches), "gradients": gradients}
        return {**parts, "drafter activations and loss chunks": work}

    def _fill_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)

    def update(self, batches: list[ReplayBatch]) -> tuple[int, dict[str, int]]:
        """Optimizer state in bytes, and what its step holds beside it."""
        parts = {**self._waiting(batches), "gradients": tensor_bytes(self.trainable)}
        make, options = self.make_optimizer, {}
        if make is None:
            if "8bit" in self.args.optim:
                return _eight_bit_state(self.trainable), parts
            make, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
        with self.live as live:
            self._fill_gradients()
            start = live.begin()
            optimizer = make(self.trainable, **options)
            torch.nn.utils.clip_grad_norm_(self.trainable, self.args.max_grad_norm or 1.0)
            optimizer.step()
            state = live.live - start
            parts["clipping and the optimizer's step"] = live.peak - live.live
        return state, parts


def _eight_bit_state(parameters: list[nn.Parameter]) -> int:
    """Two moments of bitsandbytes' 8-bit Adam: a byte a weight and a scale a block of 256; 32 bits where small."""
    sizes = [parameter.numel() for parameter in parameters]
    return sum(2 * (size + 4 * math.ceil(size / 256)) if size >= 4096 else 8 * size for size in sizes)
