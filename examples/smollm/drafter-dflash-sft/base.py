"""The contract every drafter keeps.

Speculation, replay and training reach a drafter only through these members, so a third architecture is one file and
one line in `DRAFTERS`. Knows nothing of rollouts, losses or where anchors come from.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import InputError
from .drafter_config import DrafterConfig




@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, whatever it was before outside, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class Proposal:
    """
    Blocks drafted at a grid of anchors.

    Args:
        tokens (`torch.LongTensor` of shape `(B, M, K)`):
            Target token ids.
        probs (`torch.Tensor` of shape `(B, M, K, V)`, *optional*):
            Distributions they were drawn from, over the target's vocabulary; `None` for argmax proposals.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None = None


def check_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: object) -> None:
    """
    Raises:
        `ValueError`: A tensor is missing, unexpected, or of the wrong shape or dtype, by name. Floating-point dtypes
            of at least 16 bits may stand for each other.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong_shape, wrong_dtype = [], []
    for name in sorted(expected.keys() & found.keys()):
        mine, theirs = expected[name], found[name]
        if mine.shape != theirs.shape:
            wrong_shape.append(f"{name} is {list(theirs.shape)}, not {list(mine.shape)}")
        casts = mine.is_floating_point() and theirs.is_floating_point() and theirs.itemsize > 1
        if mine.dtype != theirs.dtype and not casts:
            wrong_dtype.append(f"{name} is {theirs.dtype}, not {mine.dtype}")
    faults = {"Missing": missing, "Unexpected": unexpected, "Wrong shape": wrong_shape, "Wrong dtype": wrong_dtype}
    if any(faults.values()):
        told = ". ".join(f"{fault}: {names or 'none'}" for fault, names in faults.items())
        raise InputError(f"The tensors in {where} are not this model's. {told}. Re-export it in its published layout.")


class Drafter(PreTrainedModel, ABC):
    """
    A small model that proposes `num_draft_tokens` tokens after an anchor, from tapped target states or from the text.
    What it proposes is a chain; there are no trees.

    Attributes:
        kind (`str`): Key in `DRAFTERS`.
        config_class (`type[DrafterConfig]`): Its config.
        vocab_map (`torch.LongTensor` of shape `(DV,)`, *optional*): Draft id → target id; `None` when they are equal.
    """

    kind: str
    config_class: type[DrafterConfig]
    vocab_map: torch.Tensor | None = None
    # The class of transformers that reads a folder of this kind, and whether with code that lies beside the weights.
    auto_class = "AutoModel"
    code_travels = True
    # A module's code as files of one folder. The registry sets it: it stays behind where this file has travelled, and
    # transformers copies the files that it loaded.
    travelling_code: Callable[[str], dict[str, str]] | None = None
    main_input_name = "features"
    supports_gradient_checkpointing = True
    # Set by transformers' `activation_checkpointing_enable`; [`draft`] then keeps no activations of its blocks.
    gradient_checkpointing = False
    _target = None  # A [`Target`]; transformers evaluates annotations of a class.

    # -- to be provided by each architecture ---------------------------------------------------------------------

    @property
    @abstractmethod
    def num_draft_tokens(self) -> int:
        """K, proposals a block."""

    @abstractmethod
    def check_target(self, target: TargetShape) -> None:
        """Raise `ValueError` naming every way in which this drafter does not fit `target`."""

    @abstractmethod
    def start(self, batch_size: int, max_length: int) -> Any:
        """
        An empty drafting state for texts of up to `max_length` positions. What it is, is nobody else's business: keys
        of a context, or a whole KV cache of the drafter's own. Rolling back is overwriting, by position.
        """

    @abstractmethod
    def extend(
        self,
        state: Any,
        features: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        lanes: torch.Tensor | None = None,
    ) -> None:
        """
        Read target features of committed positions into the state, in place.

        Args:
            features (`torch.Tensor` of shape `(R, Q, F)`): Tapped states; F is 0 without taps.
            positions (`torch.LongTensor` of shape `(R, Q)`): Where they stand. Positions past the committed text may
                be given; what they leave behind is overwritten before it becomes visible.
            tokens (`torch.LongTensor` of shape `(R, S)`): The texts so far, by position.
            lanes (`torch.LongTensor` of shape `(R,)`, *optional*): State lanes; all by default.
        """

    @abstractmethod
    def propose(
        self, state: Any, tokens: torch.Tensor, anchors: torch.Tensor, limit: int, choose: Chooser
    ) -> Proposal:
        """
        Draft a block at each anchor of a grid; nothing is kept in the state.

        Args:
            tokens, anchors (`torch.LongTensor` of shape `(B, M)`): Anchor tokens and their positions.
            limit (`int`): Positions of the state to look at, at least the largest anchor.
            choose ([`Chooser`]): Turns logits into proposals.
        """

    @abstractmethod
    def draft(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        """
        The same drafting with gradients, for many blocks of whole texts at once.

        Args:
            features (`torch.Tensor` of shape `(B, T, F)`): Tapped states of the texts.
            tokens (`torch.LongTensor` of shape `(B, T)`): The texts.
            blocks ([`DraftBlocks`]): Blocks to draft; drafters that read their own proposals read `draft_tokens`.

        Returns:
            `torch.Tensor` of shape `(N, K, S)`: states that [`logits`] turns into draft logits. What they hold, and
            how wide they are, is the drafter's own.
        """

    @abstractmethod
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """
        States of [`draft`], `(…, S)` → draft logits `(…, DV)`, in the dtype they are computed in. Through the head's
        modules, so that what adapts them counts.
        """

    # -- with a default --------------------------------------------------------------------------------------------

    # Weight of slot k in SFT is `sft_decay ** (k - 1)`, as the architecture's recipe has it.
    sft_decay: float = 1.0
    # Whether [`auxiliary_loss`] reads the target's distribution also where the teacher is its hard token alone.
    auxiliary_reads_target = False
    # A loss of the drafter's own: `auxiliary_loss(states, draft_logps, target_logps)` of states `(S', S)` and both
    # log-probabilities `(S', DV)`, float32, the target's `None` where nobody reads them. It gives values `(S',)` by
    # name: `loss` is added to the slot's loss, and all of them are logged as `auxiliary/<name>`, the same ones each
    # time. It is called inside the loss's chunks, so what it holds is not kept; with no slots too (S' = 0).
    auxiliary_loss: Callable[..., dict[str, torch.Tensor]] | None = None

    @property
    def target_layer_ids(self) -> list[int]:
        """Target layers read, counted from 0, as outputs of those layers. Without any, features have width 0."""
        return []

    @property
    def linear_head(self) -> torch.Tensor | None:
        """
        The head `(DV, S)`, where [`logits`] is a product of states with it and nothing more (no adapter on it), so
        that a fused kernel can take it.
        """
        return None

    def init_from_target(self, target: Target) -> Drafter:
        """Start from the target's weights where shapes fit; nothing by default."""
        return self

    @classmethod
    def made_for(cls, target: Target, init_from_target: bool = True, **options: Any) -> Drafter:
        """
        A new drafter shaped after `target` and bound to it, as [`create_drafter`] makes it.

        Args:
            target ([`Target`]): What it will draft for.
            init_from_target (`bool`, *optional*, defaults to `True`): Call [`init_from_target`].
            options: Of the config's `from_target`.
        """
        drafter = cls(cls.config_class.from_target(target.config, **options)).to(target.device).bind(target)
        return drafter.init_from_target(target) if init_from_target else drafter

    @classmethod
    def from_drafter(cls, drafter: Drafter, **options: Any) -> Drafter:
        """
        A drafter of this kind that starts where one of another kind stands, not yet bound to a target.

        Args:
            drafter ([`Drafter`]): Where to start; it stays as it is.
            options: Config fields that are not to be as there.

        Raises:
            `TypeError`: There is no such field.
            `ValueError`: The kinds share nothing to start from, or an option changes the shape of what they share.
        """
        raise InputError(f"A {cls.kind} drafter cannot start from one of kind {drafter.kind}. Drop `from_drafter`.")

    # -- folders: the layout a class writes, and the other layouts it can read ----------------------------------------

    @classmethod
    def recognises(cls, config: dict[str, Any]) -> bool:
        """Whether a folder with this `config.json` holds a drafter of this class."""
        algorithm = config.get("speculators_model_type")
        return algorithm == cls.kind if algorithm else cls.__name__ in (config.get("architectures") or [])

    @classmethod
    def can_adopt(cls, config: dict[str, Any]) -> bool:
        """Whether the class's `adopt(path, target, dtype)` makes a drafter of the plain model in such a folder."""
        return False

    @classmethod
    def canonical_tensors(cls, tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """A folder's tensors under the names this class gives them; what only they tell is settled in `config`."""
        return tensors

    def folder_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse: this class's tensors under the names that they have in its folder."""
        return tensors

    def speculators_tensors(
        self, tensors: dict[str, torch.Tensor], target_embedding: Callable[[], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        The same in a `speculators` folder.

        Args:
            tensors (`dict`): This class's.
            target_embedding (`Callable`): Fetches the target's input embedding, for layouts that hold it.
        """
        return tensors

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Drafter | tuple[Drafter, dict[str, Any]]:
        """
        What `AutoModel.from_pretrained(..., trust_remote_code=True)` calls; here, `load_drafter` reads more layouts.

        Raises:
            `ValueError`: A tensor is missing, unexpected or of the wrong shape, which transformers would only warn of.
        """
        # AutoModel reads the config as the plain Qwen3 or Llama one that `model_type` names.
        if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
            config = cls.config_class.from_dict(config.to_dict())
        drafter, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        if faults := {name: keys for name, keys in info.items() if keys}:
            where = pretrained_model_name_or_path
            raise InputError(f"The tensors in {where} are not those of a {cls.__name__}: {faults}.")
        return (drafter, info) if output_loading_info else drafter

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The Trainer goes on from a folder's file without `load_drafter`, so the names in it are understood here too.
        if state_dict.keys() - self.state_dict().keys():
            state_dict = self.canonical_tensors(dict(state_dict), self.config)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Write the folder: weights, config, and the code that loads it where this package is not installed.

        Raises:
            `ValueError`: `state_dict` lacks a tensor, or holds one that is not the drafter's, by name.
        """
        if state_dict is None:
            state_dict = self.state_dict()
        else:
            check_tensors(self.state_dict(), state_dict, "the state to save")
        module = type(self).__module__
        code = self.travelling_code(module) if self.code_travels and self.travelling_code is not None else {}
        if code:
            # AutoModel alone: an engine that is told to trust remote code would run ours to read the config.
            self.config.auto_map = {self.auto_class: f"{module.rpartition('.')[2]}.{type(self).__name__}"}
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            for name, source in code.items():
                Path(save_directory, name).write_text(source, encoding="utf-8")
        tensors = self.folder_tensors(state_dict)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=tensors, **kwargs)
        if is_main_process:
            # safetensors lets nobody but its owner read a file; the config has the mode that this process gives files.
            for file in Path(save_directory).glob("*.safetensors"):
                shutil.copymode(Path(save_directory, "config.json"), file)

    # -- shared --------------------------------------------------------------------------------------------------

    def refuse_misfit(self, faults: list[str], target: TargetShape) -> None:
        """
        Raises:
            `ValueError`: There are faults; it names all of them.
        """
        if faults:
            raise InputError(
                f"This {self.kind} drafter does not fit the target {target.name}: {'; '.join(faults)}. Take the "
                "drafter made for this target, or make one with `create_drafter`."
            )

    def fit(self, target: TargetShape) -> None:
        """
        Settle what the config leaves to the target. Positions reach at least as far as the target's: engines size
        their RoPE tables by the drafter's own `max_position_embeddings`.

        Raises:
            `ValueError`: The two do not fit.
        """
        self.check_target(target)
        positions = getattr(target.config, "max_position_embeddings", None) or 0
        self.config.max_position_embeddings = max(self.config.max_position_embeddings, positions)

    def bind(self, target: Target) -> Drafter:
        """
        Lend the target's embedding and head; they never become parameters of the drafter.

        Args:
            target ([`Target`]): Where this file has travelled, anything that has the target's `name`, `config`,
                `hidden_size`, `vocab_size`, `num_layers`, `embedding`, `embed` and `head`.

        Raises:
            `ValueError`: The two do not fit.
        """
        self.fit(target)
        self._target = target
        return self

    @property
    def target(self) -> Target:
        if self._target is None:
            raise RuntimeError(f"This {self.kind} drafter borrows from its target: call `drafter.bind(target)` first.")
        return self._target

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Draft vocabulary ids → target ids."""
        return draft_ids if self.vocab_map is None else self.vocab_map[draft_ids]

    def as_proposal(self, draft_ids: torch.Tensor, probs: torch.Tensor | None) -> Proposal:
        """What a [`Chooser`] gave for all slots `(B, M, K)`, over the target's vocabulary."""
        if probs is not None and self.vocab_map is not None:
            wide = probs.new_zeros((*probs.shape[:-1], self.config.vocab_size))
            probs = wide.index_copy_(-1, self.vocab_map, probs)
        return Proposal(self.to_target_ids(draft_ids), probs)

    def proposal_of(self, states: torch.Tensor, choose: Chooser) -> Proposal:
        """
        Of blocks whose states `(B, M, K, …)` are all known: what `choose` makes of their logits, or, where it has a
        `read`, of the states, as it may want fewer logits than all.
        """
        read = getattr(choose, "read", None)
        return self.as_proposal(*(choose(self.logits(states)) if read is None else read(states, self.logits)))

    def join_steps(self, steps: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Proposal:
        """[`as_proposal`] of what it gave slot by slot, `(B, M)` each."""
        draft_ids, probs = zip(*steps, strict=True)
        return self.as_proposal(
            torch.stack(draft_ids, dim=-1), None if probs[0] is None else torch.stack(probs, dim=2)
        )
