"""Which model classes of an engine hand hidden states to drafters. Usage: ASKED FOUND, JSON files."""

import json
import sys

from shared import stub


def vllm(architecture):
    """Whether vLLM has such a class, and whether it is of the interface that hands hidden states."""
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    return (
        None if known is None else dict.fromkeys(("blocks", "eagle3"), bool(supports_eagle3(known.load_model_cls())))
    )


def sglang(architecture):
    """Whether SGLang has such a class, and which of the methods that hand hidden states."""
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry._load_default_models()
    known = ModelRegistry.models.get(architecture)
    methods = {"blocks": "set_dflash_layers_to_capture", "eagle3": "set_eagle3_layers_to_capture"}
    return known and {kind: hasattr(known, method) for kind, method in methods.items()}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    look = {"vllm": vllm, "sglang": sglang}[asked["engine"]]
    library = stub(*{"vllm": ("uvloop", "xgrammar", "llguidance"), "sglang": ("tvm_ffi", "vllm")}[asked["engine"]])
    found = {}
    for architecture in asked["architectures"]:
        try:
            found[architecture] = look(architecture)
        except Exception as error:
            found[architecture] = f"{type(error).__name__}: {error}"
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)
