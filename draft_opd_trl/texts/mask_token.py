"""The token that stands for a slot to fill: one that never occurs in text, picked from a target's own.

Drafters that fill a block at once read it at every slot. A token of the text there would say something; so it must be
one that no text holds. Knows no drafters and no models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..core.checks import check_value, nearest
from ..core.errors import InputError


# Names of tokens that are there for a later use: <|reserved_special_token_7|>, <unused12>, [control_8] …
_MASK = re.compile(r"[<\[].*mask.*[>\]]", re.IGNORECASE)
_RESERVED = re.compile(
    r"[<\[].*(reserved|unused|place.?holder|dummy|(extra|control)_?(id_)?\d).*[>\]]", re.IGNORECASE | re.DOTALL
)
_ROLES = ("bos", "eos", "pad", "sep", "cls")
# Characters that no tokenizer has whole: it spells them in bytes, or writes its unknown token.
_RARE = "\u0378\U000e0f0f\uffff"


@dataclass(frozen=True)
class MaskToken:
    """
    Args:
        id (`int`): A row of the target's embedding.
        token (`str`, *optional*): What the tokenizer calls it; `None` where no token has that row.
        why (`str`): Why it was taken.
    """

    id: int
    token: str | None
    why: str

    def __str__(self) -> str:
        return f"{self.id} ({'no token' if self.token is None else self.token}): {self.why}"


def choose_mask_token(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    generation_config: Any = None,
    texts: Iterable[Sequence[int]] = (),
    wanted: int | str | None = None,
) -> MaskToken:
    """
    A token that can stand for a slot: the tokenizer's own mask, a reserved token, or a row of the embedding that no
    token has; failing those a special token without a role.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        config ([`~transformers.PreTrainedConfig`]): The target's.
        generation_config ([`~transformers.GenerationConfig`], *optional*): The target's, which names more stop tokens.
        texts (`Iterable[Sequence[int]]`, *optional*): Token ids of prompts or texts, in which it must not occur.
        wanted (`int` or `str`, *optional*): This one, by its id or its text, if it can be.

    Raises:
        `ValueError`: What is wanted is no token, or cannot stand for a slot; or no token can.
    """
    held = _Held(tokenizer, config, generation_config, texts)
    if wanted is not None:
        token_id = held.id_of(wanted)
        if fault := held.fault(token_id):
            raise InputError(
                f"mask_token_id {wanted!r} cannot stand for a slot to fill: {fault}. Leave it out, and one is picked."
            )
        return MaskToken(token_id, held.names.get(token_id), "as given")
    for token_id, why in _candidates(held):
        if held.fault(token_id) is None:
            return MaskToken(token_id, held.names.get(token_id), why)
    raise InputError(
        f"None of the {held.rows} tokens of the target can stand for a slot to fill: each is a word, or ends, pads or "
        "frames texts. Add a token to the target (`tokenizer.add_tokens`, `model.resize_token_embeddings`), or take a "
        "kind of drafter that needs no mask token."
    )


def _candidates(held: _Held) -> Iterator[tuple[int, str]]:
    """Ids with the reason to take them, the best first."""
    tokenizer, names = held.tokenizer, held.names
    if tokenizer.mask_token_id is not None:
        yield tokenizer.mask_token_id, "the tokenizer's own mask token"
    for token_id in sorted(names):
        if _MASK.fullmatch(names[token_id]):
            yield token_id, "a mask token, by its name"
    # Whoever uses one of several reserved tokens takes the first.
    for token_id in sorted(names, reverse=True):
        if _RESERVED.fullmatch(names[token_id]):
            yield token_id, "reserved, by its name"
    for token_id in range(held.rows):
        if token_id not in names:
            yield token_id, f"a row of the embedding that none of the {len(names)} tokens has"
    for token_id in sorted(held.special, reverse=True):
        yield token_id, "a special token that neither the chat template nor a config names"
    if tokenizer.unk_token_id is not None:
        yield tokenizer.unk_token_id, "the unknown token, which a tokenizer with bytes never writes"


class _Held:
    """What a target and texts say of their tokens, for [`fault`]."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        generation_config: Any,
        texts: Iterable[Sequence[int]],
    ) -> None:
        self.tokenizer, self.rows = tokenizer, config.get_text_config().vocab_size
        self.names = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
        self.special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special.discard(tokenizer.unk_token_id)
        self.template = str(tokenizer.chat_template or "")
        self.in_texts = set(itertools.chain.from_iterable(texts))
        self.roles = _roles(tokenizer, config, generation_config)

    def id_of(self, wanted: int | str) -> int:
        """The id of a token that is named by it or by its text."""
        wanted = check_value("mask_token_id", wanted, int | str)
        if isinstance(wanted, int):
            return wanted
        vocabulary = self.tokenizer.get_vocab()
        if wanted not in vocabulary:
            known = [self.names[number] for number in self.tokenizer.added_tokens_decoder]
            raise InputError(
                f"mask_token_id {wanted!r} is no token of the target's tokenizer.{nearest(wanted, known)} Give a "
                "token or its id, or leave it out, and one is picked."
            )
        return vocabulary[wanted]

    def fault(self, token_id: int) -> str | None:
        """Why a token cannot stand for a slot, if it cannot."""
        if not 0 <= token_id < self.rows:
            return f"the target's embedding has the rows 0 … {self.rows - 1}"
        if token_id in self.roles:
            return f"it is the target's {self.roles[token_id]}"
        if token_id in self.in_texts:
            return "it occurs in the prompts"
        name = self.names.get(token_id)
        if name is None:
            return None
        if name in self.template:
            return f"the chat template writes {name}"
        if token_id == self.tokenizer.unk_token_id:
            written = self.tokenizer(_RARE, add_special_tokens=False)["input_ids"]
            return f"the tokenizer writes {name} for what it does not know" if token_id in written else None
        named = token_id == self.tokenizer.mask_token_id or _MASK.fullmatch(name) or _RESERVED.fullmatch(name)
        return None if named or token_id in self.special else f"{name!r} is a token of ordinary text"


def _roles(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation_config: Any) -> dict[int, str]:
    """Tokens that a tokenizer or a config gives something to do, and what that is called."""
    roles = {getattr(tokenizer, f"{role}_token_id", None): f"{role}_token_id" for role in _ROLES}
    fields = [config.to_dict(), config.get_text_config().to_dict()]
    fields += [] if generation_config is None else [generation_config.to_dict()]
    for name, value in itertools.chain.from_iterable(part.items() for part in fields):
        if re.fullmatch(r"\w+_token_(ids?|index)", name) and not name.startswith("mask"):
            for token_id in value if isinstance(value, list) else [value]:
                if isinstance(token_id, int):
                    roles.setdefault(token_id, name)
    roles.pop(None, None)
    return roles
