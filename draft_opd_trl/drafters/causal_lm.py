"""A small causal language model as a drafter: it reads the text itself, and its folder stays a plain model.

Any causal LM of transformers that has the target's vocabulary and rotary positions. This code does not travel: nobody
needs it to read the folder. Knows nothing of rollouts, losses or where anchors come from.
Source: Leviathan et al. (arXiv 2211.17192). vLLM serves it as `draft_model`, SGLang as `STANDALONE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core.cache import PositionCache, cache_argument, visible
from ..core.errors import InputError, InputTypeError
from ..core.packing import pack_by_text
from .base import Drafter, Proposal, in_eval_mode
from .causal_lm_config import CausalLMConfig
from .parts import copy_fitting, dense_weight, plain_weight


if TYPE_CHECKING:
    from ..core.records import DraftBlocks
    from ..core.sampling import Chooser
    from ..core.target import Target
    from ..core.target_shape import TargetShape


# What is seen of keys, `(B, 1, Q, S)`, by layers with a window of so many positions, or without one.
Sees = Callable[[int | None], torch.Tensor]


class CausalLMDrafter(Drafter):
    """
    A causal LM of transformers, whole, with its own embedding, head and cache. Its modules have their names in the
    plain model, and so have the tensors of its folder, and what an adapter trains.

    Args:
        config ([`CausalLMConfig`]): The model's config, and K.
    """

    kind = "causal_lm"
    config_class = CausalLMConfig
    base_model_prefix = ""
    auto_class = "AutoModelForCausalLM"
    code_travels = False
    _supports_sdpa = True

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = config.ties
        self._take(AutoModelForCausalLM.from_config(config.lm, dtype=torch.float32, attn_implementation="sdpa"))
        self.post_init()

    def _take(self, lm: PreTrainedModel) -> None:
        """Make a model's modules this one's."""
        self.config.lm = lm.config
        for name, module in lm.named_children():
            self.add_module(name, module)
        # By name, as an adapter puts a module of its own there.
        names = {module: name for name, module in lm.named_modules()}
        self._decoder, self._embedding = names[lm.get_decoder()], names[lm.get_input_embeddings()]
        self._head = names[lm.get_output_embeddings()]

    def plain(self) -> PreTrainedModel:
        """The model of transformers that these modules are."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(self.config.lm)
        for name, module in self.named_children():
            lm.add_module(name, module)
        return lm.train(self.training)

    # -- where one comes from -----------------------------------------------------------------------------------------

    @classmethod
    def made_for(
        cls, target: Target, init_from_target: bool = True, path: str | None = None, **options: Any
    ) -> CausalLMDrafter:
        """
        A drafter from a model that is there, or of the target's own last layers.

        Args:
            target ([`Target`]): What it will draft for.
            init_from_target (`bool`, *optional*, defaults to `True`): Without `path`, copy the target's weights.
            path (`str`, *optional*): Folder or id of a causal LM with the target's tokens. Where only the padding of
                the two vocabularies differs, it gets the target's.
            options: `num_draft_tokens`; without `path`, all of [`CausalLMConfig.from_target`].

        Raises:
            `TypeError`: An option that there is not.
            `ValueError`: No such model, or it has other tokens than the target.
        """
        if path is None:
            return super().made_for(target, init_from_target, **options)
        if other := sorted(options.keys() - {"num_draft_tokens"}):
            raise InputTypeError(f"With a path the model is as it is there, but {other} were given. Leave them out.")
        return cls.adopt(path, target, **options).to(target.device).bind(target)

    @classmethod
    def _is_plain(cls, config: dict[str, Any]) -> bool:
        """Whether a folder with this `config.json` holds a causal LM of transformers, drafter or not."""
        plain = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
        return plain is not None and config.get("architectures") == [plain]

    @classmethod
    def can_adopt(cls, config: dict[str, Any]) -> bool:
        return cls._is_plain(config) and not cls.recognises(config)

    @classmethod
    def adopt(
        cls, path: str, target: TargetShape, dtype: torch.dtype | str = torch.float32, **options: Any
    ) -> CausalLMDrafter:
        """
        A drafter that is a plain model, not yet bound.

        Args:
            path, options: As in [`made_for`].
            target ([`TargetShape`]): What it will draft for.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): Of its weights; `"auto"` keeps the
                stored one.
        """
        lm = _read_model(path, dtype)
        _fit_vocabulary(lm, path, target)
        with torch.device("meta"):
            drafter = cls(CausalLMConfig(**options, **{**lm.config.to_dict(), "dtype": None}))
        drafter._take(lm)
        drafter._check_reading()
        return drafter.eval()

    @torch.no_grad()
    def init_from_target(self, target: Target) -> CausalLMDrafter:
        """
        Start from the target's embedding, last layers, norm and head where shapes fit.
        """
        mine, theirs = self.get_decoder(), target.decoder
        pairs = [*zip(mine.layers[::-1], theirs.layers[::-1], strict=False)]
        pairs += [(mine.norm, theirs.norm)] if hasattr(mine, "norm") else []  # of the target's own type
        pairs += [(self.get_input_embeddings(), target.embedding), (self.get_output_embeddings(), target.head)]
        for module, source in pairs:
            theirs = dict(source.named_modules())
            for name, part in module.named_modules():
                for own, parameter in part.named_parameters(recurse=False):
                    matrix = isinstance(part, nn.Linear) and own == "weight"
                    copy_fitting(parameter, dense_weight(theirs[name]) if matrix else getattr(theirs[name], own))
        return self

    @classmethod
    def recognises(cls, config: dict[str, Any]) -> bool:
        return "num_draft_tokens" in config and cls._is_plain(config)

    @classmethod
    def canonical_tensors(cls, tensors: dict[str, torch.Tensor], config: CausalLMConfig) -> dict[str, torch.Tensor]:
        tied = {name: tensors[source] for name, source in config.ties.items() if source in tensors}
        if other := [name for name in tied if name in tensors and not torch.equal(tensors[name], tied[name])]:
            raise InputError(
                f"tie_word_embeddings is true, but {other} is not the embedding. Set it to false, or leave that out."
            )
        return {**tied, **tensors}

    def folder_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in self.config.ties}

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def num_draft_tokens(self) -> int:
        return self.config.num_draft_tokens

    def check_target(self, target: TargetShape) -> None:
        mine, theirs = self.config.vocab_size, target.vocab_size
        told = f"drafter vocab_size {mine} is not the target's {theirs}, and engines want both equal"
        self.refuse_misfit([told] if mine != theirs else [], target)

    def bind(self, target: Target) -> CausalLMDrafter:
        super().bind(target)
        self._check_reading()
        return self

    @torch.no_grad()
    def _check_reading(self) -> None:
        """
        Raises:
            `ValueError`: What is read and computed here, piece by piece, is not what the model says itself.
        """
        tokens, anchor = torch.arange(3, device=self.device)[None], torch.tensor([[2]], device=self.device)
        seen = []

        def choose(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
            seen.append(logits.float())
            return logits.argmax(-1), None

        with in_eval_mode(self):
            state = self.start(1, 3)
            self.extend(state, None, tokens[:, :2], tokens)
            proposed = self.propose(state, tokens[:, 2:], anchor, 3, choose).tokens[:, 0]
            text = torch.cat([tokens, proposed[:, :-1]], dim=1)
            expected = self.plain()(input_ids=text, use_cache=False).logits[:, 2:].float()
        got = torch.cat(seen, dim=1)
        # Rounded to 16 bits, both paths drift apart from layer to layer.
        tolerance = max(1e-2, 32 * torch.finfo(self.dtype).eps)
        if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()):
            raise InputError(
                f"A {self.config.model_type} model computes more than attention over earlier positions and a head: "
                f"read token by token, its logits are off by {(got - expected).abs().max().item():.3g}. Take another "
                "model as a drafter."
            )

    def get_decoder(self) -> nn.Module:
        return self.get_submodule(self._decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self._embedding)

    def get_output_embeddings(self) -> nn.Module:
        # Asked for by adapters on all matrices, which leave the head alone.
        return self.get_submodule(self._head)

    @property
    def _softcap(self) -> float | None:
        return getattr(self.config.lm, "final_logit_softcapping", None)

    @property
    def linear_head(self) -> torch.Tensor | None:
        return plain_weight(self.get_output_embeddings()) if self._softcap is None else None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        head = self.get_output_embeddings()
        logits = head(states.to(head.weight.dtype))
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(
        self, tokens: torch.Tensor, positions: torch.Tensor, sees: Sees, cache: PositionCache | None = None
    ) -> torch.Tensor:
        """States `(B, Q, H)` of tokens at their positions."""
        decoder, shape = self.get_decoder(), self.config.shape
        if shape.hybrid:
            mask = {"full_attention": sees(None), "sliding_attention": sees(shape.window)}
        else:
            mask = sees(shape.window)
        cached = {} if cache is None else {cache_argument(decoder.forward): cache}
        return decoder(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=cache is not None, **cached
        ).last_hidden_state

    def start(self, batch_size: int, max_length: int) -> PositionCache:
        return PositionCache(self.config.num_hidden_layers, batch_size, max_length)

    def extend(self, state, features, positions, tokens, lanes=None) -> None:
        state.place(positions, state.max_length, lanes)
        keys = torch.arange(state.max_length, device=positions.device)
        read = tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1))
        self._read(read, positions, lambda window: visible(positions, keys, window), state)

    # -- drafting -----------------------------------------------------------------------------------------------------

    def propose(self, state, tokens, anchors, limit, choose: Chooser) -> Proposal:
        (batch, chains), device = anchors.shape, anchors.device
        # The state stays as it is: the chains' keys stand behind a copy of the texts', a row of cells a step.
        branch, text = state.branch(limit, chains * self.num_draft_tokens), torch.arange(limit, device=device)
        chain, before, steps = torch.arange(chains, device=device), (text < anchors[..., None])[:, None], []
        read = anchors[:, :0]  # where what the chains have read stands
        for step in range(self.num_draft_tokens):
            positions, cells = anchors + step, limit + step * chains + chain
            read = torch.cat([read, positions], dim=1)
            same = chain[:, None] == chain.repeat(step + 1)

            def sees(window: int | None, positions=positions, read=read, same=same) -> torch.Tensor:
                own = visible(positions, read, window) & same
                return torch.cat([visible(positions, text, window) & before, own], dim=-1)

            branch.place(cells.expand(batch, -1), limit + read.shape[1])
            steps.append(choose(self.logits(self._read(tokens, positions, sees, branch))))
            tokens = steps[-1][0]
        return self.join_steps(steps)

    def draft(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        """
        One pass over the texts, and behind each of them what its blocks read that is not the text.

        Up to its first token that is not the text's, a block is the text. So teacher forcing costs the texts alone.
        """
        self._check_ties()
        (batch, length), device = tokens.shape, tokens.device
        slots = torch.arange(blocks.num_draft_tokens, device=device)
        places, texts = blocks.anchors[:, None] + slots, blocks.texts[:, None]
        is_text = tokens[texts, places[:, 1:].clamp(max=length - 1)] == blocks.draft_tokens[:, :-1]
        last = blocks.anchors + (is_text & (places[:, 1:] < length)).long().cumprod(1).sum(1)
        block, slot = (places > last[:, None]).nonzero().T
        columns, width = pack_by_text(blocks.texts[block], batch)

        def behind(text: torch.Tensor, values: torch.Tensor, fill: int) -> torch.Tensor:
            """Values of the texts `(B, T)`, then of what stands behind them."""
            grid = values.new_full((batch, width), fill).index_put((blocks.texts[block], columns), values)
            return torch.cat([text, grid], dim=1)

        order = torch.arange(length, device=device).expand(batch, -1)
        positions = behind(order, places[block, slot], 0)
        # What of its text each sees, and which block it belongs to: a text is none, and neither is an empty cell.
        reach = behind(order, last[block], 0)[:, None, :, None]
        owner = behind(torch.full_like(order, -1), block, -2)
        in_text = torch.arange(length + width, device=device) < length
        same = torch.where(in_text, positions[:, None] <= reach[:, 0], owner[:, :, None] == owner[:, None])[:, None]
        read = behind(tokens, blocks.draft_tokens[block, slot - 1], 0)
        states = self._read(read, positions, lambda window: visible(positions, positions, window) & same)
        return states[texts, places.index_put((block, slot), length + columns)]

    def _check_ties(self) -> None:
        """
        Raises:
            `ValueError`: One of two modules that share a weight is adapted, so that merging would change the other.
        """
        ends = {"embedding": self.get_input_embeddings(), "head": self.get_output_embeddings()}
        adapted = [name for name, module in ends.items() if list(module.children())]
        if adapted and self.config.ties:
            raise InputError(
                f"peft_config adapts the {' and '.join(adapted)} of a {self.kind} drafter whose head is its "
                "embedding, so merging would change both. Leave them out of target_modules and modules_to_save."
            )


def _read_model(path: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """
    Raises:
        `ValueError`: No such model, or its folder is not whole.
    """
    try:
        lm, told = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path!r} holds no causal language model that transformers reads ({' '.join(str(error).split())}). Give "
            "the folder or id of one."
        ) from error
    if faults := {name: keys for name, keys in told.items() if keys}:
        raise InputError(f"The tensors in {path} are not those of a {type(lm).__name__}: {faults}.")
    return lm


def _tokens_of(path: str) -> dict[str, int] | None:
    """The tokens of a folder's tokenizer and their ids, if it can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # Without files some classes make up a tokenizer of nothing but special tokens.
    tokens = tokenizer.get_vocab()
    return tokens if tokens.keys() - set(tokenizer.all_special_tokens) else None


def _fit_vocabulary(lm: PreTrainedModel, path: str, target: TargetShape) -> None:
    """
    Give a model the target's vocabulary size, as engines want it, where the difference is padding.

    Raises:
        `ValueError`: It has other tokens, or where the sizes differ that cannot be told.
    """
    rows, wanted = lm.config.get_text_config().vocab_size, target.vocab_size
    mine, theirs = _tokens_of(path), _tokens_of(target.name)
    known = mine is not None and theirs is not None
    sizes = f"{path} has a vocabulary of {rows}, and the target {target.name} one of {wanted}"
    if known and (mine != theirs or max(mine.values()) >= min(rows, wanted)):
        differ = len(mine.items() ^ theirs.items())
        raise InputError(f"{sizes}, with {differ} tokens that differ. Take a model with the target's tokenizer.")
    if rows == wanted:
        return
    if not known:
        raise InputError(
            f"{sizes}. Whether they differ in padding alone cannot be told, as both tokenizers are not within reach. "
            "Put them into the folders, or take a model with the target's vocabulary."
        )
    lm.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            # No token stands there. The mean of all rows makes none of them likely.
            module.weight[rows:] = module.weight[:rows].mean(0)
