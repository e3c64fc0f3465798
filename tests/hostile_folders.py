"""Drafter folders that are broken, damaged or hostile, made from whole ones: plain, in `speculators`, and adapters.

Of every one of them the right outcome is a `UserError`, or the very drafter of the whole folder. Changes that make
another drafter of it (a RoPE base, a block size left out) are not among them.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file


# What takes its place in turn. Text, so that what JSON libraries would not write is among it.
JUNK = {
    "text of a number": '"8"',
    "text": '"x"',
    "markup": '"`</td>\\n|"',
    "empty list": "[]",
    "list of text": '["x"]',
    "list of lists": "[[1]]",
    "object": "{}",
    "object in object": '{"x": {"x": 1}}',
    "minus one": "-1",
    "million": "1000000",
    "beyond 64 bits": "1" + "0" * 30,
    "five thousand digits": "1" * 5000,
    "fraction": "0.5",
    "overflow": "1e400",
    "not a number": "NaN",
    "infinity": "-Infinity",
    "true": "true",
    "null": "null",
    "nested": "[" * 3000 + "]" * 3000,
    "deeply nested": "[" * 200_000 + "]" * 200_000,
}
# Values that another drafter may have.
_SOUND = {
    "rms_norm_eps": {"fraction"},
    "rope_theta": {"fraction", "million"},
    "norm_output": {"true"},
    "norm_before_residual": {"true"},
    "block_size": {"null"},
    "num_draft_tokens": {"null"},
    "speculative_tokens": {"null"},
    "lora_alpha": {"fraction", "million"},
    "use_rslora": {"true"},
    "fan_in_fan_out": {"true"},
    "proposal_methods": {"empty list", "null", "object"},
    "speculators_config": {"object", "object in object", "null"},
    "base_model_name_or_path": set(JUNK),
    # A table of scales by pattern may be left out where it is empty, and is no whole number.
    "rope_parameters": {"object in object"},
}
_MARK = "\0junk\0"


def _paths(config: dict, prefix: tuple = ()) -> Iterator[tuple]:
    for name, value in config.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, name))


def _with(config: dict, path: tuple, text: str) -> str:
    """The JSON of a config in which the value at `path` reads `text`."""
    copied = json.loads(json.dumps(config))
    inner = copied
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = _MARK
    return json.dumps(copied).replace(json.dumps(_MARK), text)


def _config_changes(
    file: str, config: dict, draws: Random, values: int
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Changes of a JSON file: as a file, and field by field."""
    whole = json.dumps(config).encode()
    texts = {
        "empty": b"",
        "cut": whole[: draws.randrange(1, len(whole) - 1)],
        "a list": b"[1, 2]",
        "a number": b"7",
        "null": b"null",
        "not UTF-8": whole.replace(b"{", b"{\xff", 1),
        "UTF-16": whole.decode().encode("utf-16"),
        "zeros": bytes(1000),
        "nested": b'{"x": ' * 100_000 + b"1" + b"}" * 100_000,
        "forty megabytes": b'{"x": "' + b"x" * 40_000_000 + b'"}',
        "twice": whole + whole,
    }
    for name, text in texts.items():
        yield f"{file}: {name}", lambda folder, text=text: (folder / file).write_bytes(text) and None

    def directory(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    def loop(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(file)

    def fifo(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    yield f"{file}: a directory", directory
    yield f"{file}: a link to itself", loop
    yield f"{file}: a pipe", fifo
    for path in _paths(config):
        if path[0] == "auto_mapping":
            continue
        sound = set().union(*(_SOUND.get(name, set()) for name in path[-1:]))
        for junk in draws.sample(sorted(JUNK.keys() - sound), min(values, len(JUNK.keys() - sound))):
            text = _with(config, path, JUNK[junk])
            yield (
                f"{file}: {'.'.join(path)} is {junk}",
                lambda folder, text=text: (folder / file).write_text(text) and None,
            )


def _rewrite(file: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _weight_changes(file: str, draws: Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Changes of a safetensors file: as a file, and tensor by tensor."""

    def raw(change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
        return lambda folder: (folder / file).write_bytes(change(bytearray((folder / file).read_bytes()))) and None

    def header_flip(data: bytearray) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        data[draws.randrange(8 + size)] = draws.randrange(256)
        return bytes(data)

    yield f"{file}: empty", raw(lambda data: b"")
    yield f"{file}: garbage", raw(lambda data: draws.randbytes(3000))
    yield f"{file}: half", raw(lambda data: bytes(data[: len(data) // 2]))
    yield f"{file}: one byte short", raw(lambda data: bytes(data[:-1]))
    yield f"{file}: one byte more", raw(lambda data: bytes(data + b"x"))
    yield f"{file}: an endless header", raw(lambda data: struct.pack("<Q", 2**62) + bytes(data[8:]))
    yield f"{file}: a nested header", raw(lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000)
    for turn in range(6):
        cut = draws.random()
        yield f"{file}: cut, {turn}", raw(lambda data, cut=cut: bytes(data[: int(len(data) * cut)]))
    for turn in range(12):
        yield f"{file}: a byte of the header, {turn}", raw(header_flip)

    def some(tensors: dict) -> str:
        return draws.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point()))

    changes: dict[str, Callable[[dict], object]] = {
        "none": lambda tensors: tensors.clear(),
        "missing": lambda tensors: tensors.pop(some(tensors)),
        "extra": lambda tensors: tensors.update(extra=torch.ones(3)),
        "renamed": lambda tensors: tensors.update({f"model.{some(tensors)}": tensors.pop(some(tensors))}),
        "int8": lambda tensors: tensors.update({some(tensors): tensors[some(tensors)].to(torch.int8)}),
        "all int8": lambda tensors: tensors.update({name: value.to(torch.int8) for name, value in tensors.items()}),
        "float8": lambda tensors: tensors.update({some(tensors): tensors[some(tensors)].to(torch.float8_e4m3fn)}),
        "complex": lambda tensors: tensors.update({some(tensors): tensors[some(tensors)].to(torch.complex64)}),
        "another shape": lambda tensors: tensors.update({some(tensors): torch.ones(7)}),
        "a scalar": lambda tensors: tensors.update({some(tensors): torch.ones(())}),
        "empty tensor": lambda tensors: tensors.update({some(tensors): torch.ones(0)}),
        "not a number": lambda tensors: tensors[some(tensors)].view(-1)[:1].fill_(float("nan")),
        "infinite": lambda tensors: tensors[some(tensors)].view(-1)[:1].fill_(float("inf")),
    }
    for name, change in changes.items():
        yield f"{file}: {name}", lambda folder, change=change: _rewrite(folder / file, change)

    def directory(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    yield f"{file}: a directory", directory
    yield f"{file}: missing", lambda folder: (folder / file).unlink()


class RunsCode:
    """Unpickled, it leaves a folder `mark`; nobody may."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def _pickle_changes(file: str, pickled: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The weights as a pickle, whole and broken."""

    def saved(make: Callable[[dict, Path], object]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            made = make(load_file(folder / file), folder)
            (folder / file).unlink()
            if isinstance(made, bytes):
                (folder / pickled).write_bytes(made)
            else:
                torch.save(made, folder / pickled)

        return change

    def compressed(tensors: dict, folder: Path) -> bytes:
        torch.save(tensors, folder / "scratch")
        with zipfile.ZipFile(folder / "scratch") as whole, zipfile.ZipFile(folder / "small", "w", 8) as small:
            for name in whole.namelist():
                small.writestr(name, whole.read(name))
        (folder / "scratch").unlink()
        return (folder / "small").read_bytes()

    def expanded(tensors: dict, folder: Path) -> dict:
        return {name: tensor.flatten()[:1].expand(10**12) for name, tensor in tensors.items()}

    yield f"{pickled}: as it should be", saved(lambda tensors, folder: tensors)
    yield f"{pickled}: garbage", saved(lambda tensors, folder: b"\x80\x02garbage")
    yield f"{pickled}: empty", saved(lambda tensors, folder: b"")
    yield f"{pickled}: code", saved(lambda tensors, folder: pickle.dumps(RunsCode(folder / "code-ran")))
    yield f"{pickled}: code by torch", saved(lambda tensors, folder: {**tensors, "x": RunsCode(folder / "code-ran")})
    yield f"{pickled}: a list", saved(lambda tensors, folder: list(tensors.values()))
    yield f"{pickled}: numbers", saved(lambda tensors, folder: dict.fromkeys(tensors, 1.0))
    yield f"{pickled}: expanded", saved(expanded)
    yield f"{pickled}: compressed", saved(compressed)
    yield f"{pickled}: sparse", saved(lambda tensors, folder: {name: one.to_sparse() for name, one in tensors.items()})


def _index_changes(draws: Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The weights in shards with an index, whole and broken."""

    def sharded(change: Callable[[Path, dict], object]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            tensors = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            names = sorted(tensors)
            where = {}
            for number, part in enumerate((names[::2], names[1::2]), start=1):
                file = f"model-0000{number}-of-00002.safetensors"
                save_file({name: tensors[name] for name in part}, folder / file)
                where |= dict.fromkeys(part, file)
            index = {"metadata": {}, "weight_map": where}
            index = change(folder, index) or index
            text = index if isinstance(index, str) else json.dumps(index)
            (folder / "model.safetensors.index.json").write_text(text)

        return write

    def moved(name: str) -> Callable[[Path, dict], None]:
        def change(folder: Path, index: dict) -> None:
            index["weight_map"][draws.choice(sorted(index["weight_map"]))] = name

        return change

    def stray(folder: Path, index: dict) -> None:
        tensors = load_file(folder / "model-00001-of-00002.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "z.safetensors")

    def doubled(folder: Path, index: dict) -> None:
        first, second = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
        save_file({**load_file(second), **load_file(first)}, second)

    yield "index: as it should be", sharded(lambda folder, index: None)
    yield "index: a stray file", sharded(stray)
    yield "index: a tensor twice", sharded(doubled)
    yield "index: a file elsewhere", sharded(moved("../model.safetensors"))
    yield "index: an absolute path", sharded(moved("/etc/passwd"))
    yield "index: a file that is not there", sharded(moved("model-00003-of-00002.safetensors"))
    yield "index: a number for a file", sharded(moved(7))
    yield "index: the other file", sharded(moved("model-00001-of-00002.safetensors"))
    yield "index: no map", sharded(lambda folder, index: index.pop("weight_map") and None)
    yield "index: an empty map", sharded(lambda folder, index: index["weight_map"].clear())
    yield "index: not JSON", sharded(lambda folder, index: "{")
    yield "index: nested", sharded(lambda folder, index: "[" * 100_000)
    yield (
        "index: missing",
        sharded(
            lambda folder, index: (
                (folder / "model-00001-of-00002.safetensors").rename(folder / "one.safetensors") and None
            )
        ),
    )


def _adapter_changes() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Changes of an adapter's config that PEFT follows into a hang, a loop or silence."""

    def fields(**values: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))

        return change

    runaway = "(([a-z_0-9.]+)+)+!"
    yield "adapter: a pattern that never ends", fields(target_modules=runaway)
    yield "adapter: exclusions that never end", fields(exclude_modules=runaway)
    yield "adapter: ranks that never end", fields(rank_pattern={runaway: 2})
    yield "adapter: scales that never end", fields(alpha_pattern={runaway: 2})
    yield "adapter: choices that never end", fields(target_modules="(l|l)" * 40)
    yield "adapter: options that never end", fields(target_modules="(.?)" * 60 + "!")
    yield "adapter: layers that never end", fields(layers_pattern=runaway, layers_to_transform=[0])
    yield "adapter: kept modules that never end", fields(modules_to_save=[runaway])
    yield "adapter: a rank of a billion", fields(r=10**9)
    yield "adapter: a rank of a billion for one", fields(rank_pattern={"fc": 10**9})
    yield "adapter: layers again and again", fields(layer_replication=[[0, 10**8]])
    yield "adapter: a module to import", fields(megatron_config={}, megatron_core="antigravity")
    yield "adapter: imports", fields(megatron_config={"x": 1}, megatron_core="antigravity")
    yield "adapter: no scale", fields(lora_alpha=0)
    yield "adapter: another method", fields(peft_type="IA3")
    yield "adapter: prompts", fields(peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    yield "adapter: no method", fields(peft_type="NONE")
    yield "adapter: fewer targets", fields(target_modules=["fc"])
    yield "adapter: targets that are not there", fields(target_modules=["fc", "elsewhere"])
    yield "adapter: no base", fields(base_model_name_or_path=None)
    yield "adapter: a base that is gone", fields(base_model_name_or_path="/nowhere/at/all")

    def own_base(folder: Path) -> None:
        fields(base_model_name_or_path=str(folder))(folder)

    yield "adapter: its own base", own_base


def _plain_changes(draws: Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    def stray(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "zzz.safetensors")

    yield "a stray safetensors file", stray
    yield "nothing but weights", lambda folder: (folder / "config.json").unlink()
    yield "an empty folder", lambda folder: [path.unlink() for path in folder.iterdir()] and None
    yield from _index_changes(draws)


def broken_folders(whole_folder: Path, scratch: Path, draws: Random, values: int = 2) -> Iterator[tuple[str, Path]]:
    """
    Folders made from a whole one, each in a place of its own that is cleared after its turn.

    Args:
        whole_folder (`Path`): Of a drafter, flat or in the `speculators` layout, or of an adapter on one.
        scratch (`Path`): Where they are made.
        draws (`random.Random`): Chooses values and places.
        values (`int`, *optional*, defaults to `2`): How many unfit values each field of a config takes in turn.

    Yields:
        What is the matter, and the folder.
    """
    adapter = (whole_folder / "adapter_config.json").is_file()
    config = "adapter_config.json" if adapter else "config.json"
    weights, pickled = ("adapter_model", "adapter_model") if adapter else ("model", "pytorch_model")
    fields = json.loads((whole_folder / config).read_text())
    changes = [
        *_config_changes(config, fields, draws, values),
        *_weight_changes(f"{weights}.safetensors", draws),
        *_pickle_changes(f"{weights}.safetensors", f"{pickled}.bin"),
        *(_adapter_changes() if adapter else _plain_changes(draws)),
    ]
    for number, (name, change) in enumerate(changes):
        folder = scratch / f"{number:04d}"
        shutil.copytree(whole_folder, folder)
        change(folder)
        yield name, folder
        shutil.rmtree(folder)
