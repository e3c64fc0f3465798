"""Which model classes of an engine hand hidden states to drafters. Usage: ENGINE ARCHITECTURES RESULT, JSON files."""

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
    engine, asked, result = sys.argv[1:]
    library = stub("uvloop", "xgrammar", "llguidance") if engine == "vllm" else stub("tvm_ffi", "vllm")
    found = {}
    with open(asked) as file:
        for architecture in json.load(file):
            try:
                found[architecture] = {"vllm": vllm, "sglang": sglang}[engine](architecture)
            except Exception as error:
                found[architecture] = f"{type(error).__name__}: {error}"
    with open(result, "w") as file:
        json.dump(found, file)
