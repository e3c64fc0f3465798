"""What the target said of texts that it has read before: texts and target are fixed, so are its states.

Kept in memory or on disk up to a budget; what does not fit is read anew. Knows no drafters beyond the layers they tap.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .errors import InputError
from .files import atomic_file, check_writable, writing
from .target import Target


logger = logging.get_logger(__name__)

GIB = 2**30
SUFFIX = ".safetensors"


class StateStore:
    """
    A target's pass over texts, from memory where it has been made before.

    A text is read alone and without padding, so that what is kept of it, and what is found where nothing was kept, are
    the same bits, whichever texts stand beside it and whenever a run was interrupted.

    Args:
        target ([`Target`]): Reads.
        layer_ids (`Sequence[int]`): The layers whose output is tapped, as in [`Target.forward_text`].
        budget (`float`): GiB; what is over it is not kept.
        folder (`str` or `os.PathLike`, *optional*): Keeps on disk what any process may read, in a folder of its own
            for each target, taps and dtype; in memory by default.
        dtype (`torch.dtype`, *optional*): What values are rounded to, also those that are read anew; the target's own
            by default.

    Raises:
        `ValueError`: The machine has less memory, or the disk less room, than the budget.
        `OSError`: `folder` cannot be written to.
    """

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        budget: float,
        folder: str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.target, self.layer_ids, self.dtype = target, list(layer_ids), dtype or target.dtype
        self.free = int(budget * GIB)
        self.found = self.asked = 0
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._folder: Path | None = None
        if folder is None:
            _check_room("memory", psutil.virtual_memory().available, self.free)
            return
        check_writable(folder)
        own = f"{target.fingerprint()} {self.layer_ids} {self.dtype}"
        self._folder = Path(folder) / hashlib.sha256(own.encode()).hexdigest()[:16]
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        sizes = {path.name: path.stat().st_size for path in self._folder.glob(f"*{SUFFIX}")}
        self._names = set(sizes)
        self.free -= sum(sizes.values())
        _check_room(f"disk space at {folder}", shutil.disk_usage(self._folder).free, self.free)

    def read(self, tokens: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        [`Target.forward_text`] over right-padded texts.

        Args:
            tokens (`torch.LongTensor` of shape `(B, T)`), lengths (`torch.LongTensor` of shape `(B,)`): The texts.

        Returns:
            `features` of shape `(B, T, len(layer_ids) · H)` and `states` `(B, T, H)`, in the target's dtype; zero at
            padding.
        """
        target, width = self.target, tokens.shape[1]
        features = tokens.new_zeros((len(tokens), width, len(self.layer_ids) * target.hidden_size), dtype=target.dtype)
        states = tokens.new_zeros((len(tokens), width, target.hidden_size), dtype=target.dtype)
        for row, length in enumerate(lengths.tolist()):
            kept = self._of(tokens[row, :length])
            features[row, :length], states[row, :length] = kept["features"], kept["states"]
        return features, states

    def take_counts(self) -> tuple[int, int]:
        """Texts that were kept, of those asked for since the last call."""
        counts, self.found, self.asked = (self.found, self.asked), 0, 0
        return counts

    def _of(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """`features (T, F)` and `states (T, H)` of one text."""
        name = hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest()[:32] + SUFFIX
        self.asked += 1
        kept = self._memory.get(name) if self._folder is None else self._from_disk(name)
        if kept is not None:
            self.found += 1
            return kept
        features, states = self.target.forward_text(text[None], self.layer_ids)
        read = {"features": features[0].to(self.dtype), "states": states[0].to(self.dtype)}
        size = sum(part.nbytes for part in read.values())
        if size <= self.free:
            self.free -= size
            self._keep(name, {part: values.cpu().contiguous() for part, values in read.items()})
        return read

    def _keep(self, name: str, read: dict[str, torch.Tensor]) -> None:
        if self._folder is None:
            self._memory[name] = read
            return
        with writing(self._folder, "What was kept before is whole."), atomic_file(self._folder / name) as part:
            save_file(read, part)
        self._names.add(name)

    def _from_disk(self, name: str) -> dict[str, torch.Tensor] | None:
        if name not in self._names and not (self._folder / name).exists():  # which another process may have written
            return None
        try:
            return load_file(self._folder / name)
        except (SafetensorError, OSError) as error:
            told = " ".join(str(error).split())[:200]
            logger.warning(f"{self._folder / name} cannot be read ({told}); its text is read anew.")
            return None


def _check_room(what: str, there: int, wanted: int) -> None:
    if wanted > there:
        raise InputError(
            f"state_store_gib asks for {wanted / GIB:.3g} GiB of {what}, and {there / GIB:.3g} are free. Lower it: "
            "states that do not fit are read anew."
        )
