"""Pocket models with heads as wide as vLLM's kernels for CPUs want them, which compute what the shipped ones do."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


# The next width after the shipped heads' that the kernels know.
HEAD_DIM = 64


def _spread(matrix: torch.Tensor, dim: int, old: int) -> torch.Tensor:
    """The rows or columns of heads, of `old` each, where they stand in wider heads: both halves from the start on."""
    parts = matrix.unflatten(dim, (-1, 2, old // 2))
    padding = parts.new_zeros(*parts.shape[: dim + 2], (HEAD_DIM - old) // 2, *parts.shape[dim + 3 :])
    return torch.cat([parts, padding], dim=dim + 2).flatten(dim, dim + 2)


def widen(source: Path, folder: Path) -> Path:
    """
    The very model with heads of `HEAD_DIM`, their new dimensions zero.

    What the width alone decides is undone: RoPE's frequencies by its base, the norms' means over a head by a factor
    on what they read, and the scale of scores by one on queries.
    """
    config = json.loads((source / "config.json").read_text())
    old, tensors = config["head_dim"], load_file(source / "model.safetensors")
    factor = math.sqrt(HEAD_DIM / old)
    for name in [name for name, tensor in tensors.items() if tensor.is_floating_point()]:
        tensor, part = tensors[name].float(), name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            tensor = _spread(tensor, 0, old)
            normed = name.replace("_proj", "_norm") in tensors
            tensor *= factor if part == "q_proj" or normed else 1
        elif part == "o_proj":
            tensor = _spread(tensor, 1, old)
        elif part in ("q_norm", "k_norm"):
            tensor = _spread(tensor, 0, old) / (factor if part == "k_norm" else 1)
        tensors[name] = tensor.contiguous()
    theta = config["rope_parameters"]["rope_theta"] ** (HEAD_DIM / old)
    config |= {"head_dim": HEAD_DIM, "dtype": "float32"}
    config["rope_parameters"]["rope_theta"] = theta
    if "rope_theta" in config:
        config["rope_theta"] = theta
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
