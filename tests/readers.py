"""What the package writes for people and engines, read back, and changed."""

import ast
import json
import re
import shlex

from conftest import tiny_drafter, tiny_model
from safetensors.torch import load_file

from draft_opd_trl.core.target import Target
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.folders.serving import ENGINES


def checked(card):
    """Well-formed: no leftovers of the template, whole tables, code that parses."""
    assert not re.search(r"{{|{%|%}|}}|\bNone\b|\n\n\n", card.text), card.text
    for table in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
        assert re.fullmatch(r"\|(-+\|)+", table.splitlines()[1]), table
    assert len(re.findall(r"^\|---", card.text, flags=re.MULTILINE)) == len(
        re.findall(r"(?:^\|.*\n)+", card.text, re.M)
    )
    for code in re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE):
        ast.parse(code)
    assert card.data.library_name == "transformers"
    return card


def data_of(file):
    """What a page of traces holds."""
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("utf-8"), re.DOTALL)
    return json.loads(script[1])


# Field → value for any tiny drafter, and where it is read: SGLang 0.5.23 (in sglang/srt/), vLLM 0.33.0 (in vllm/).
READ_OF_ANY = {
    "tie_word_embeddings": False,  # sglang models/llama_eagle3.py:303
    "rope_theta": 10000.0,  # sglang utils/hf_transformers/common.py:517, where rope_parameters is not understood
    "rope_parameters.rope_theta": 10000.0,  # sglang .../common.py:515; vllm qwen3_dflash.py:348
    "max_position_embeddings": 256,  # sglang models/dflash.py:270; vllm qwen3_dflash.py:336
}


def assert_written_for_engines(folder, fields, tensors):
    """What `make test-serving` checks with the engines' own loaders, held by name; returns the tensors."""
    written = load_file(folder / "model.safetensors")
    assert written.keys() == tensors
    config = json.loads((folder / "config.json").read_text())
    for path, expected in {**READ_OF_ANY, **fields}.items():
        value = config
        for name in path.split("."):
            value = value[name]
        assert value == expected, path
    return written


def set_field(path, value):
    """A change of a config, for the fixture `make_folder`."""
    *outer, name = path.split(".")

    def change(config):
        for part in outer:
            config = config[part]
        config[name] = value

    return change


def drop_fields(*names):
    return lambda config: [config.pop(name) for name in names]


def assert_config_fault(folder, words, breaks):
    """Of a folder whose config is wrong, inspection says one thing in such words, and for whom it breaks it."""
    told = inspect_drafter(folder)
    found = [fault for fault in told["faults"] if words in fault["fault"]]
    assert [set(fault["breaks"]) for fault in found] == [breaks], told["faults"]
    assert {loader for loader, loads in told["loads"].items() if not loads} >= breaks
    assert not breaks & told["launch"].keys()


def assert_engines_refuse(kind, family, refuse, folder):
    """Engines that hand no hidden states of such a target to such a drafter are not promised."""
    target = Target(tiny_model(family))
    target.model.save_pretrained(folder / "target")
    tiny_drafter(kind, target).save_pretrained(folder / "drafter")
    told = inspect_drafter(str(folder / "drafter"), str(folder / "target"))
    assert {loader for loader, loads in told["loads"].items() if not loads} == refuse
    assert told["launch"].keys() == {"SGLang", "vLLM"} - refuse
    assert {engine for fault in told["faults"] for engine in fault["breaks"]} == refuse
    for engine in refuse:
        assert any(f"{engine} {ENGINES[engine]} hands no hidden" in fault["fault"] for fault in told["faults"])


def launch_options(folder):
    """What the commands that serve a folder's drafter say: vLLM's speculative config and SGLang's options."""
    launch = inspect_drafter(folder)["launch"]
    vllm, sglang = (shlex.split(launch[engine].replace("\\\n", "")) for engine in ("vLLM", "SGLang"))
    assert vllm[:4] == ["vllm", "serve", "TARGET", "--speculative-config"]
    assert sglang[:3] == ["python", "-m", "sglang.launch_server"]
    return json.loads(vllm[4]), dict(zip(sglang[3::2], sglang[4::2], strict=True))
