"""The frozen target: tapped features, final states, head, embeddings, packed block scoring.

Wraps a causal LM of transformers and never changes it. It does not know which drafter reads its taps.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from .cache import PositionCache, cache_argument, visible
from .errors import InputError
from .kept_states import KeptStates
from .packing import pack_by_text
from .records import DraftBlocks
from .rereading import TextStore
from .target_seams import (
    before_head,
    cache_fault,
    check_head,
    check_whole_weights,
    decoder_of,
    kept_fault,
    logit_scale,
    text_model,
)
from .target_shape import TargetShape


logger = logging.get_logger(__name__)


class Target(TargetShape):
    """
    A frozen causal LM, read at the seams speculative decoding needs.

    Not an `nn.Module` on purpose: a drafter or trainer that holds it must not register, save or train its weights.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder-only LM, whatever its layers, or a multimodal model with one inside. Put into eval mode,
            gradients off, dtype untouched.

    Attributes:
        no_places (`str`, *optional*): Why no cache with a place for each position is exact over this target: the
            states of its own cache are kept instead ([`KeptStates`]), and blocks are scored by reading their text
            anew. `None` where one is.
        reads_anew (`str`, *optional*): Why speculation, too, reads every text anew at each round: its own cache is
            not exact either. `None` where one of the two is.
        sharded (`bool`): Whether a forward is a meeting of all ranks ([`shard`]).

    Raises:
        `ValueError`: The model does not read tokens alone, later tokens change what is said of earlier ones, RoPE
            depends on how long the texts of a batch are, layers cannot be tapped, head or
            embedding is quantised, or the head post-processes its logits in a way not handled here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config)
        model = text_model(model)
        self.model = model.eval().requires_grad_(False)
        self.name = self.config._name_or_path or type(model).__name__
        self.decoder = decoder_of(model)
        self.head = model.get_output_embeddings()
        self._before_head = before_head(model)
        self.embedding = model.get_input_embeddings()
        self._cache_argument = cache_argument(self.decoder.forward)
        self._takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        check_whole_weights(self)
        self.vocab_size = self.head.weight.shape[0]
        self._softcap = getattr(self.config, "final_logit_softcapping", None)
        self._scale = logit_scale(self.config)
        self.sharded = False
        self.check_exact()
        check_head(self)
        self.no_places = self.no_cache_because or cache_fault(self)
        self.reads_anew = self.no_places and kept_fault(self)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def quantized(self) -> bool:
        return getattr(self.model, "hf_quantizer", None) is not None

    @property
    def linear_head(self) -> torch.Tensor | None:
        """The head's weight `(V, H)`, if logits are states times it and nothing more."""
        plain = type(self.head) is torch.nn.Linear and self.head.bias is None
        plain = plain and self._softcap is None and self._scale == 1
        return self.head.weight if plain else None

    def fingerprint(self, samples: int = 1024) -> str:
        """Hash of the config, the revision and some values of every weight: cheap, and another model has another."""
        config = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}
        config.pop("transformers_version", None)
        revision = getattr(self.model.config, "_commit_hash", None)
        digest = hashlib.sha256(json.dumps([config, revision], sort_keys=True, default=str).encode())
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()
            if weight.numel() and not weight.is_meta:  # offloaded
                values = weight.detach().reshape(-1)
                values = values[:: max(values.numel() // samples, 1)].contiguous().cpu()
                digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> None:
        """Move all weights; shards stay where their mesh is."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)

    # -- weights over several ranks ------------------------------------------------------------------------------

    def shard(self, **options: Any) -> None:
        """
        Spread the layers' weights over all ranks (FSDP2), in their own dtype.

        Embedding, final norm and head stay whole: drafters and losses read them. From here on a forward is a meeting
        of all ranks, see [`uneven_forwards`].

        Args:
            options: Of `torch.distributed.fsdp.fully_shard`.
        """
        for layer in self.decoder.layers:
            # Said aloud, as each layer is a root of its own, and roots would keep what they gathered.
            fully_shard(layer, reshard_after_forward=True, **options)
        self.sharded = True

    @contextmanager
    def uneven_forwards(self) -> Iterator[None]:
        """
        Inside, ranks may call the target a different number of times; leaving waits for all of them.

        The layers of a sharded target are gathered by all ranks together, so a rank that is done runs empty forwards
        until the last one is.
        """
        yield
        if self.sharded:
            idle = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            while self._count_running(0):
                self.decoder(input_ids=idle, use_cache=False)

    def _count_running(self, running: int) -> torch.Tensor:
        """Ranks that are about to run a forward of their own."""
        count = torch.tensor(running, device=self.device)
        torch.distributed.all_reduce(count)
        return count

    # -- forwards ------------------------------------------------------------------------------------------------

    def _masks(self, full: torch.Tensor, windowed: torch.Tensor | None) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.config._attn_implementation == "eager":
            low = torch.finfo(self.dtype).min
            full, windowed = (
                None if mask is None else torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, low)
                for mask in (full, windowed)
            )
        if self.hybrid:
            return {"full_attention": full, "sliding_attention": windowed}
        return full if windowed is None else windowed

    def _run(
        self, layer_ids: Sequence[int], cache: PositionCache | None = None, **inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run_decoder(layer_ids, cache, **inputs)[:2]

    def _run_decoder(
        self, layer_ids: Sequence[int], cache: Cache | None, **inputs
    ) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Tapped features, final states, and the cache that the decoder gives back, if any."""
        if self.sharded:
            self._count_running(1)
        if cache is not None:
            inputs[self._cache_argument] = cache
        tapped = [index + 1 for index in layer_ids]
        output = self.decoder(output_hidden_states=tapped or False, **inputs)
        features = [output.hidden_states[index] for index in tapped]
        states = output.last_hidden_state
        if self._before_head is not None:
            states = self._before_head(states)
        taps = torch.cat(features, dim=-1) if features else states[..., :0]
        return taps, states, getattr(output, self._cache_argument, None)

    @torch.no_grad()
    def go_on(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache | None,
        mask: torch.Tensor | None = None,
        layer_ids: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """
        Read on, as the model's own decoding does.

        Args:
            tokens, positions (`torch.LongTensor` of shape `(R, Q)`): New tokens and where they stand.
            cache ([`~transformers.Cache`], *optional*): The model's own; written in place. `None` at a text's start.
            mask (`torch.LongTensor` of shape `(R, S + Q)`, *optional*): 0 where the cache or the tokens are padding.
            layer_ids (`Sequence[int]`): As in [`forward_text`].

        Returns:
            `features` `(R, Q, len(layer_ids) · H)`, `states` `(R, Q, H)`, and the cache behind the tokens.
        """
        inputs = {"position_ids": positions} if self._takes_positions else {}
        return self._run_decoder(layer_ids, cache, input_ids=tokens, attention_mask=mask, use_cache=True, **inputs)

    @torch.no_grad()
    def forward_text(
        self, tokens: torch.Tensor, layer_ids: Sequence[int], cache: PositionCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        One pass over whole texts.

        Args:
            tokens (`torch.LongTensor` of shape `(B, T)`): Right-padded; padding is harmless under causality.
            layer_ids (`Sequence[int]`): Layers whose *output* is tapped, counted from 0.
            cache ([`PositionCache`], *optional*): Filled with the text's keys, for [`score_blocks`].

        Returns:
            `features` of shape `(B, T, len(layer_ids) · H)` and `states` before the head `(B, T, H)`, in the
            target's dtype.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if isinstance(cache, TextStore):
            cache.write(tokens, positions, tokens.shape[1])
        if cache is None or isinstance(cache, TextStore):
            return self._run(layer_ids, input_ids=tokens, use_cache=False)
        return self.forward_cached(tokens, positions, cache, tokens.shape[1], layer_ids)

    @torch.no_grad()
    def forward_cached(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: PositionCache,
        limit: int,
        layer_ids: Sequence[int] = (),
        lanes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Prefill or verification: new tokens at their positions, on top of a cache.

        Args:
            tokens, positions (`torch.LongTensor` of shape `(R, Q)`): New tokens and where they stand.
            cache ([`PositionCache`]): Written in place.
            limit (`int`): Positions to attend to, above every position in play.
            layer_ids (`Sequence[int]`): As in [`forward_text`].
            lanes (`torch.LongTensor` of shape `(R,)`, *optional*): Cache lanes; all by default.

        Returns:
            `features` `(R, Q, len(layer_ids) · H)` and `states` `(R, Q, H)`.
        """
        if isinstance(cache, TextStore):
            return cache.read(self, tokens, positions, limit, layer_ids, lanes)
        cache.place(positions, limit, lanes)
        keys = torch.arange(limit, device=tokens.device)
        windowed = visible(positions, keys, self.window) if self.window else None
        masks = self._masks(visible(positions, keys), windowed)
        return self._run(
            layer_ids,
            input_ids=tokens,
            position_ids=positions,
            attention_mask=masks,
            cache=cache,
            use_cache=True,
        )

    def new_cache(self, batch_size: int, max_length: int) -> PositionCache | TextStore:
        """An empty cache of this target's depth, or what stands in for it where none is exact."""
        if self.reads_anew is None:
            if self.no_places is None:
                return PositionCache(self.num_layers, batch_size, max_length)
            return KeptStates(batch_size, max_length, self.device)
        logger.warning_once(
            f"{self.name}: every round of speculation reads its texts from the start, because {self.reads_anew}. That "
            "is exact, and slow. Texts written by the target alone (rollout_source='generate') or by a server, and "
            "evaluation by replay, need a single pass over a text."
        )
        return TextStore(batch_size, max_length, self.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings as the target sees them (Gemma's scale included): `(…,)` → `(…, H)`."""
        return self.embedding(tokens)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Next-token logits of states before the head: `(…, H)` → `(…, V)`, float32, soft cap applied."""
        return self.shape_logits(self.head(states).float())

    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What the target does to raw head outputs before the softmax (a scale, Gemma-style soft cap)."""
        logits = logits if self._scale == 1 else logits * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    @torch.no_grad()
    def score_blocks(
        self, tokens: torch.Tensor, blocks: DraftBlocks, cache: PositionCache, chunk_size: int = 64
    ) -> torch.Tensor:
        """
        The target's states at rejected slots, given the drafted prefix; many blocks packed after one text.

        Only what the text does not hold is computed: the first rejected slot's prefix *is* text, and the last drafted
        token is never an input.

        Args:
            tokens (`torch.LongTensor` of shape `(B, T)`): Texts.
            blocks ([`DraftBlocks`]): Blocks over those texts.
            cache ([`PositionCache`]): Holds the texts (from [`forward_text`]); left unchanged.
            chunk_size (`int`, *optional*, defaults to `64`): Blocks of a text scored in one pass; bounds memory.

        Returns:
            `torch.Tensor` of shape `(N, K, H)`: states that predict each slot; zero at slots up to the first
            rejected one.
        """
        count, num_draft_tokens = blocks.draft_tokens.shape
        states = torch.zeros((count, num_draft_tokens, self.hidden_size), dtype=self.dtype, device=tokens.device)
        # Input i (drafted token i + 1) predicts slot i + 2. It leaves the text at the first rejected token.
        inputs = torch.arange(num_draft_tokens - 1, device=tokens.device)
        wanted = (inputs >= blocks.num_accepted[:, None]) & blocks.has_error[:, None]
        columns, width = pack_by_text(blocks.texts, tokens.shape[0])
        for start in range(0, width, chunk_size):
            block, offset = (wanted & ((columns >= start) & (columns < start + chunk_size))[:, None]).nonzero().T
            if len(block):
                states[block, offset + 1] = self._score_inputs(tokens.shape, blocks, block, offset, cache)
        return states

    def _score_inputs(
        self,
        shape: torch.Size,
        blocks: DraftBlocks,
        block: torch.Tensor,
        offset: torch.Tensor,
        cache: PositionCache,
    ) -> torch.Tensor:
        """States `(I, H)` after drafted token `offset + 1` of each `block`, both of shape `(I,)`."""
        if isinstance(cache, TextStore):
            return cache.score(self, blocks, block, offset)
        num_texts, text_length = shape
        texts = blocks.texts[block]
        columns, width = pack_by_text(texts, num_texts)

        def grid(values: torch.Tensor, fill: int) -> torch.Tensor:
            return values.new_full((num_texts, width), fill).index_put((texts, columns), values)

        tokens = grid(blocks.draft_tokens[block, offset], 0)
        positions = grid(blocks.anchors[block] + 1 + offset, 0)
        block_ids = grid(block, -1)
        last_text = grid(blocks.anchors[block] + blocks.num_accepted[block], 0)[:, None, :, None]
        cache.place(positions, text_length, keep=False)
        text_positions = torch.arange(text_length, device=texts.device)
        same_block = (block_ids[:, :, None] == block_ids[:, None, :])[:, None]

        def mask(window: int | None) -> torch.Tensor:
            text = visible(positions, text_positions, window) & (text_positions <= last_text)
            own = visible(positions, positions, window) & same_block
            return torch.cat([text, own], dim=-1)

        _, states = self._run(
            (),
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(mask(None), mask(self.window) if self.window else None),
            cache=cache,
            use_cache=True,
        )
        return states[texts, columns]


def stop_token_ids(model: PreTrainedModel, tokenizer: object | None = None) -> list[int]:
    """
    Every token that ends a text: the target's generation config (often several), then the tokenizer's eos.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer.

    Raises:
        `ValueError`: Neither names one.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops = [configured] if isinstance(configured, int) else list(configured or [])
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and eos not in stops:
        stops.append(eos)
    if not stops:
        raise InputError(
            "No stop token: the target's generation_config.eos_token_id and the tokenizer's eos_token_id are both "
            "unset, so no text would ever end. Set generation_config.eos_token_id on the target."
        )
    return stops
