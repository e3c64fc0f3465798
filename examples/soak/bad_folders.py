"""Drafter folders damaged on purpose: refused in words, or the very drafter of the whole folder.

Values of weights are not touched: a checkpoint holds no checksum, so another finite weight is another drafter.
"""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from verdicts import Input
from world import POCKET, ROOT, folder_of, world

from draft_opd_trl import SpeculationSettings, load_drafter, speculate
from draft_opd_trl.folders.checkpoints import export_drafter


JUNK: tuple[Any, ...] = ("x", "8", [], ["x"], [[1]], {}, {"x": 1}, -1, 0, 10**6, 10**30, 0.5, float("nan"))
# Fields that no computation reads, or of which another value makes another sound drafter.
_FREE = ("rope_theta", "rms_norm_eps", "initializer_range", "transformers_version", "max_window_layers", "dtype")


def make_wholes(scratch: Path) -> list[Path]:
    """Folders that nothing is wrong with, in every layout."""
    wholes = [Path(folder_of("dflash")), Path(folder_of("eagle3"))]
    export_drafter(folder_of("dflash"), str(scratch / "speculators"), "speculators", target=str(POCKET / "target"))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "fc"], init_lora_weights=False)
    adapted = get_peft_model(load_drafter(folder_of("dflash")), config)
    adapted.save_pretrained(scratch / "adapter")
    return [*wholes, scratch / "speculators", scratch / "adapter"]


def _proposals(folder: str) -> list[list[int]]:
    drafter = load_drafter(folder).bind(world().target)
    prompts = world().prompts[:6]
    settings = SpeculationSettings(16, world().stops, batch_size=len(prompts))
    return speculate(world().target, drafter, prompts, settings).blocks.draft_tokens.tolist()


@cache
def _whole_proposals(folder: str) -> list[list[int]]:
    return _proposals(folder)


def _change_config(file: Path, draws: Random) -> str:
    fields = json.loads(file.read_text())
    inner = [fields, *(value for value in fields.values() if isinstance(value, dict) and value)]
    table = draws.choice(inner)
    name = draws.choice([name for name in table if name not in _FREE])
    # Token 0 is a mask like any other: another sound drafter.
    table[name] = draws.choice([junk for junk in JUNK if junk != table[name] and (name, junk) != ("mask_token_id", 0)])
    file.write_text(json.dumps(fields))
    return f"{file.name}: {name} is {table[name]!r}"


def _cut(file: Path, draws: Random) -> str:
    content = file.read_bytes()
    kept = draws.choice((draws.randrange(9), draws.randrange(len(content)), len(content) - 1))
    file.write_bytes(content[:kept])
    return f"{file.name} cut to {kept} bytes"


def _change_header(file: Path, draws: Random) -> str:
    content = bytearray(file.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    places = [draws.randrange(8 + size) for _ in range(draws.choice((1, 1, 4, 40)))]
    for place in places:
        content[place] ^= 1 << draws.randrange(8)
    file.write_bytes(content)
    return f"{file.name}: bits turned in bytes {places} of the header"


def _change_tensors(file: Path, draws: Random) -> str:
    tensors = load_file(file)
    name = draws.choice(sorted(tensors))
    way = draws.choice(("missing", "renamed", "extra", "int8", "nan", "wider", "transposed", "empty"))
    tensor = tensors.pop(name)
    oblong = tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]
    changed = {
        "renamed": {f"{name}x": tensor},
        "extra": {name: tensor, "stray.weight": tensor.clone()},
        "int8": {name: tensor.to(torch.int8)},
        "nan": {name: torch.full_like(tensor, float("nan"))},
        "wider": {name: torch.cat([tensor, tensor])},
        "transposed": {name: tensor.T.contiguous() if oblong else tensor[1:].clone()},
        "empty": {name: tensor[:0].clone()},
    }
    save_file({**tensors, **changed.get(way, {})}, file, metadata={"format": "pt"})
    return f"{file.name}: {name} {way}"


def _damage(folder: Path, draws: Random) -> str:
    """What was done to a folder."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    configs = [file for file in files if file.name in ("config.json", "adapter_config.json")]
    weights = [file for file in files if file.suffix == ".safetensors"]
    way = draws.randrange(6)
    if way == 0:
        return _cut(draws.choice([*configs, *weights]), draws)
    if way == 1:
        return _change_header(weights[0], draws)
    if way == 2:
        return _change_tensors(weights[0], draws)
    if way == 3 and draws.random() < 0.3:
        stray = {"norm.weight": torch.zeros(192), "stray.weight": torch.zeros(2)}
        name = draws.choice(("a.safetensors", "zz.safetensors", "pytorch_model.bin"))
        save_file(stray, folder / name)
        return f"a stray {name}"
    return _change_config(configs[0], draws)


def _hostile(whole: Path, scratch: Path, draws: Random) -> Iterator[tuple[str, Path]]:
    """Those of the tests' generator, where this tree has it, each moved to where it stays."""
    if not (ROOT / "tests" / "hostile_folders.py").is_file():
        return
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    for what, folder in importlib.import_module("hostile_folders").broken_folders(whole, scratch, draws):
        own = folder.with_name(f"{folder.name}-kept-{draws.randrange(2**32)}")
        folder.rename(own)
        folder.mkdir()
        yield what, own


def _damaged(whole: Path, scratch: Path, draws: Random) -> Iterator[tuple[str, Path]]:
    while True:
        folder = scratch / f"damaged-{draws.randrange(2**32)}"
        shutil.copytree(whole, folder)
        yield _damage(folder, draws), folder


def _input(whole: Path, what: str, folder: Path) -> Input:
    def act() -> str | None:
        try:
            found = _proposals(str(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return None if found == _whole_proposals(str(whole)) else f"loads as another drafter: {what}"

    words = [str(folder), "config.json", ".safetensors", ".bin", *what.split(" is ")[0].split(": ")[-1].split(".")]
    return Input("folders", f"{whole.name}: {what}", act, words)


def folders(scratch: str, draws: Random) -> Iterator[Input]:
    """Every other one from the tests' generator, while it has any."""
    wholes = make_wholes(Path(scratch))
    for whole in wholes:
        _whole_proposals(str(whole))  # before the fork
    hostile: list[Callable] = []
    for number, whole in enumerate(wholes):
        place = Path(scratch, f"hostile-{number}")
        place.mkdir()
        hostile.append(_hostile(whole, place, draws))
    plain = [_damaged(whole, Path(scratch), draws) for whole in wholes]
    for turn in itertools.count():
        number = turn // 2 % len(wholes)
        found = next(hostile[number], None) if turn % 2 else None
        yield _input(wholes[number], *(found or next(plain[number])))
