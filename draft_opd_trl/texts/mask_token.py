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
_RESERVED = re.compile(r"[<\[].*(reserved|unused|place.?holder|dummy|(extra|control)_?(id_)?\d).*[>\]]", re.IGNORECASE)
# What a tokenizer gives its tokens to do. The last name that fits is told.
_ROLES = ("cls", "sep", "pad", "bos", "eos")
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


class MaskTokens:
    """
    Which of a target's tokens can stand for a slot to fill.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        config ([`~transformers.PreTrainedConfig`]): The target's.
        generation_config ([`~transformers.GenerationConfig`], *optional*): The target's, which names more stop tokens.
        texts (`Iterable[Sequence[int]]`, *optional*): Token ids of prompts or texts, in which it must not occur.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        generation_config: Any = None,
        texts: Iterable[Sequence[int]] = (),
    ) -> None:
        self.tokenizer, self.rows = tokenizer, config.get_text_config().vocab_size
        self.names: dict[int, str] = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._template = str(tokenizer.chat_template or "")
        self._in_texts = set(itertools.chain.from_iterable(texts))
        self._roles = _roles(tokenizer, config, generation_config)

    def choose(self, wanted: int | str | None = None) -> MaskToken:
        """
        The tokenizer's own mask, a reserved token, or a row of the embedding that no token has; failing those a
        special token without a role.

        Args:
            wanted (`int` or `str`, *optional*): This one, by its id or its text, if it can be.

        Raises:
            `ValueError`: What is wanted is no token, or cannot stand for a slot; or no token can.
            `TypeError`: What is wanted is neither an id nor text.
        """
        if wanted is not None:
            token_id = self._id_of(wanted)
            if fault := self.fault(token_id):
                raise InputError(
                    f"mask_token_id {wanted!r} cannot stand for a slot to fill: {fault}. Leave it out, and one is "
                    "picked."
                )
            return MaskToken(token_id, self.names.get(token_id), "as given")
        for token_id, why in self._candidates():
            if self.fault(token_id) is None:
                return MaskToken(token_id, self.names.get(token_id), why)
        raise InputError(
            f"None of the target's {self.rows} tokens can stand for a slot to fill: each is of ordinary text, or ends,"
            " pads or frames texts. Add one (`tokenizer.add_tokens`, `model.resize_token_embeddings`), or take a kind "
            "of drafter that needs no mask token."
        )

    def _candidates(self) -> Iterator[tuple[int, str]]:
        """Ids with the reason to take them, the best first."""
        if self.tokenizer.mask_token_id is not None:
            yield self.tokenizer.mask_token_id, "the tokenizer's own mask token"
        for token_id in sorted(self.names):
            if _MASK.fullmatch(self.names[token_id]):
                yield token_id, "a mask token, by its name"
        # Whoever uses one of several reserved tokens takes the first.
        for token_id in sorted(self.names, reverse=True):
            if _RESERVED.fullmatch(self.names[token_id]):
                yield token_id, "reserved, by its name"
        for token_id in range(self.rows):
            if token_id not in self.names:
                yield token_id, f"a row of the embedding that none of the {len(self.names)} tokens has"
        for token_id in sorted(self._special - {self.tokenizer.unk_token_id}, reverse=True):
            yield token_id, "a special token that neither the chat template nor a config names"
        if self.tokenizer.unk_token_id is not None:
            yield self.tokenizer.unk_token_id, "the unknown token, which this tokenizer never writes"

    def _id_of(self, wanted: int | str) -> int:
        """The id of a token that is named by it or by its text."""
        wanted = check_value("mask_token_id", wanted, int | str)
        if isinstance(wanted, int):
            return wanted
        ids = {name: token_id for token_id, name in self.names.items()}
        if wanted not in ids:
            near = nearest(wanted, map(str, self.tokenizer.added_tokens_decoder.values()))
            raise InputError(
                f"mask_token_id {wanted!r} is no token of the target's tokenizer.{near} Give a token or its id, or "
                "leave it out, and one is picked."
            )
        return ids[wanted]

    def fault(self, token_id: int) -> str | None:
        """Why a token cannot stand for a slot, if it cannot."""
        if not 0 <= token_id < self.rows:
            return f"the target's embedding has the rows 0 … {self.rows - 1}"
        if token_id in self._roles:
            return f"it is the target's {self._roles[token_id]}"
        if token_id in self._in_texts:
            return "it occurs in the prompts"
        name = self.names.get(token_id)
        if name is None:
            return None
        if name in self._template:
            return f"the chat template writes {name}"
        if token_id == self.tokenizer.unk_token_id:
            written = self.tokenizer(_RARE, add_special_tokens=False)["input_ids"]
            return f"the tokenizer writes {name} for what it does not know" if token_id in written else None
        named = token_id == self.tokenizer.mask_token_id or _MASK.fullmatch(name) or _RESERVED.fullmatch(name)
        return None if named or token_id in self._special else f"{name!r} is a token of ordinary text"


def _roles(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation_config: Any) -> dict[int, str]:
    """Tokens that a tokenizer or a config gives something to do, and what that is called."""
    roles = {getattr(tokenizer, f"{role}_token_id", None): f"{role}_token_id" for role in _ROLES}
    fields = [config.to_dict(), config.get_text_config().to_dict()]
    fields += [] if generation_config is None else [generation_config.to_dict()]
    for name, value in itertools.chain.from_iterable(part.items() for part in fields):
        # Those of images and tools, too; a config that names a mask means the same by it.
        if re.fullmatch(r"\w+_token_(ids?|index)", name) and not name.startswith("mask"):
            for token_id in value if isinstance(value, list) else [value]:
                roles.setdefault(token_id, name)
    roles.pop(None, None)
    return roles
