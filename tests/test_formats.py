"""Layouts of drafter folders: conversion in both directions, and code that travels with the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EAGLE3_VARIANTS, random_prompts, tiny_drafter
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from draft_opd_trl.checkpoints import export_drafter, load_drafter
from draft_opd_trl.drafters import DFlashConfig
from draft_opd_trl.drafters.eagle3_config import Eagle3Config
from draft_opd_trl.errors import InputError
from draft_opd_trl.inspection import inspect_drafter
from draft_opd_trl.sampling import Chooser
from draft_opd_trl.speculation import SpeculationSettings, speculate
from draft_opd_trl.target import Target
from draft_opd_trl.travel import travelling_code


POCKET = Path(__file__).parents[1] / "examples" / "pocket"
SHIPPED = sorted(POCKET.glob("drafter-*"))
SETTINGS = SpeculationSettings(24, [], batch_size=4)


@pytest.fixture(params=SHIPPED, ids=lambda folder: folder.name)
def shipped(request):
    return request.param


def _blocks(target, drafter):
    return speculate(target, drafter.bind(target), random_prompts(6, seed=3), SETTINGS).blocks


def _assert_same(target, first, second):
    theirs = second.state_dict()
    assert first.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())
    ours, loaded = _blocks(target, first), _blocks(target, second)
    assert torch.equal(ours.draft_tokens, loaded.draft_tokens) and torch.equal(ours.anchors, loaded.anchors)


@pytest.fixture(scope="session")
def target_folder(qwen_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    qwen_target.model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(qwen_drafter, tmp_path):
    qwen_drafter.save_pretrained(tmp_path / "flat")
    return tmp_path / "flat"


def _edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != ...}))


# -- what engines read of a flat folder --------------------------------------------------------------------------

# Field → value for the tiny drafter, and where it is read: SGLang 0.5.23 (in sglang/srt/), vLLM 0.33.0 (in vllm/).
CONTRACT = {
    "dflash": {
        "architectures": ["DFlashDraftModel"],  # sglang models/dflash.py:1317; vllm .../configs/eagle.py
        "model_type": "qwen3",  # both: AutoConfig, before anything else
        "block_size": 5,  # sglang speculative/dflash_utils.py:610
        "num_target_layers": 4,  # sglang speculative/dflash_utils.py:599
        "dflash_config.target_layer_ids": [1, 2],  # sglang dflash_utils.py:658; vllm v1/.../eagle/eagle3_utils.py:124
        "dflash_config.mask_token_id": 47,  # sglang dflash_utils.py:689; vllm v1/worker/gpu/spec_decode/utils.py:101
        "layer_types": ["full_attention"] * 2,  # sglang get_dflash_layer_types; vllm qwen3_dflash.py:70
        "hidden_act": "silu",  # sglang models/dflash.py:DFlashMLP
    },
    "eagle3": {
        "architectures": ["LlamaForCausalLMEagle3"],  # sglang llama_eagle3.py:387; vllm .../configs/eagle.py
        "model_type": "llama",  # both: AutoConfig
        "draft_vocab_size": 43,  # sglang models/llama_eagle3.py:306; vllm model_executor/models/llama_eagle3.py:314
        "target_hidden_size": 32,  # sglang llama_eagle3.py:151; vllm llama_eagle3.py:219
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],  # vllm v1/worker/gpu/spec_decode/eagle/eagle3_utils.py:119
        "eagle_config.eagle_aux_hidden_state_layer_ids": [0, 1, 2],  # sglang .../spec_aux_hidden_state.py:192
        "eagle_config.use_aux_hidden_state": True,  # sglang .../spec_aux_hidden_state.py:189; vllm llama_eagle3.py
        "norm_before_residual": False,  # vllm llama_eagle3.py:101
        "fc_norm": False,  # sglang llama_eagle3.py:185; vllm llama_eagle3.py:231
    },
}
BOTH = {
    "tie_word_embeddings": False,  # sglang models/llama_eagle3.py:303
    "rope_theta": 10000.0,  # sglang utils/hf_transformers/common.py:517, where rope_parameters is not understood
    "rope_parameters.rope_theta": 10000.0,  # sglang .../common.py:515; vllm qwen3_dflash.py:348
    "max_position_embeddings": 256,  # sglang models/dflash.py:270; vllm qwen3_dflash.py:336
}
KEYS = {
    "dflash": {"fc.weight", "hidden_norm.weight", "norm.weight"}
    | {
        f"layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("input_layernorm", "post_attention_layernorm")
        + tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
        + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
    },
    "eagle3": {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    | {
        f"midlayer.{name}.weight"
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        + tuple(f"self_attn.{part}_proj" for part in "qkvo")
        + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
    },
}


def test_the_contract_with_the_engines(kind, qwen_target, tmp_path):
    """What `make test-serving` checks with their own loaders, held here by name."""
    tiny_drafter(kind, qwen_target).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == KEYS[kind]
    config = json.loads((tmp_path / "config.json").read_text())
    for path, expected in {**CONTRACT[kind], **BOTH}.items():
        value = config
        for name in path.split("."):
            value = value[name]
        assert value == expected, path
    # vLLM reads these where they are present, and drafts otherwise: qwen3_dflash.py:60, sglang models/dflash.py.
    # SpecForge skips the final norm wherever norm_output is written, false or not.
    assert not {"is_causal", "use_swa", "draft_is_causal", "norm_output"} & {*config, *config.get("dflash_config", {})}


def test_the_shipped_folders_load_everywhere(shipped):
    told = inspect_drafter(str(shipped), str(POCKET / "target"))
    assert told["faults"] == [] and all(told["loads"].values())


def test_what_is_shipped_drafts_the_same_after_saving_and_in_transformers(kind, tmp_path):
    """Trained drafters, held-out prompts; `examples/benchmarks/serving.py` measures the same on more of them."""
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    lines = (POCKET / "prompts" / "heldout.jsonl").read_text().splitlines()[:3]
    prompts = [
        tokenizer.apply_chat_template(json.loads(line)["prompt"], add_generation_prompt=True)["input_ids"]
        for line in lines
    ]
    target, settings = Target(model), SpeculationSettings(40, [])
    shipped = load_drafter(str(POCKET / f"drafter-{kind}")).bind(target)
    shipped.save_pretrained(tmp_path)
    loaded = load_drafter(str(tmp_path)).bind(target)
    first, second = (speculate(target, drafter, prompts, settings) for drafter in (shipped, loaded))
    assert torch.equal(first.blocks.draft_tokens, second.blocks.draft_tokens)
    assert float(first.blocks.num_accepted.float().mean()) > 2
    assert first.completions() == second.completions() == speculate(target, None, prompts, settings).completions()
    if kind == "dflash":
        options = {"assistant_model": loaded, "speculation_type": "dflash", "max_new_tokens": 40, "do_sample": False}
        for prompt, own in zip(prompts, first.completions(), strict=True):
            output = model.generate(torch.tensor([prompt]), eos_token_id=None, **options)
            assert output[0, len(prompt) :].tolist() == own


# -- conversion ----------------------------------------------------------------------------------------------------


def test_both_layouts_hold_the_same_drafter(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    """Flat → speculators → flat; each step is read back, and drafts the same blocks."""
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    _assert_same(qwen_target, qwen_drafter, load_drafter(str(tmp_path / "spec")))
    again = export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), qwen_drafter.kind)
    _assert_same(qwen_target, qwen_drafter, again)
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "again" / "model.safetensors").keys()
    first, last = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first == last


@pytest.mark.parametrize("variant", EAGLE3_VARIANTS)
def test_every_eagle3_variant_survives_both_layouts(qwen_target, target_folder, variant, tmp_path):
    drafter = tiny_drafter("eagle3", qwen_target, **EAGLE3_VARIANTS[variant])
    drafter.save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    _assert_same(qwen_target, drafter, export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), "eagle3"))


@pytest.mark.parametrize(
    ("kind", "flat", "spec"),
    [
        # Four target layers: layer 1's output is hidden_states[2]. Both engines agree on DFlash's flat count.
        ("dflash", {"dflash_config.target_layer_ids": [1, 2]}, {"aux_hidden_state_layer_ids": [2, 3]}),
        (
            "eagle3",
            {
                "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
                "eagle_config.eagle_aux_hidden_state_layer_ids": [0, 1, 2],
            },
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        ),
    ],
)
def test_taps_in_every_count(qwen_target, target_folder, kind, flat, spec, tmp_path):
    drafter = tiny_drafter(kind, qwen_target)
    drafter.save_pretrained(tmp_path / "flat")
    written = json.loads((tmp_path / "flat" / "config.json").read_text())
    for path, taps in flat.items():
        value = written
        for name in path.split("."):
            value = value[name]
        assert value == taps
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    written = json.loads((tmp_path / "spec" / "config.json").read_text())
    assert {name: written[name] for name in spec} == spec
    assert not {"eagle_config", "dflash_config"} & written["transformer_layer_config"].keys()
    loaded = load_drafter(str(tmp_path / "spec"))
    assert loaded.target_layer_ids == drafter.target_layer_ids


def test_the_speculators_folder(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    target = str(target_folder)
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=target, target_name="org/target")
    config = json.loads((tmp_path / "spec" / "config.json").read_text())
    assert config["speculators_model_type"] == qwen_drafter.kind
    assert config["speculators_config"] == {
        "algorithm": qwen_drafter.kind,
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]},
    }
    layer = config["transformer_layer_config"]
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"] == 10000.0
    assert layer["tie_word_embeddings"] is False
    if qwen_drafter.kind == "dflash":
        assert config["sliding_window_non_causal"] is True and config["sample_from_anchor"] is False
        assert config["block_size"] == 5 and config["mask_token_id"] == 47
    else:
        assert config["norm_before_residual"] is False and config["draft_vocab_size"] == 43
    assert "_name_or_path" not in config and "_name_or_path" not in layer and str(folder) not in json.dumps(config)
    tensors = load_file(tmp_path / "spec" / "model.safetensors")
    names = {name.replace("midlayer.", "layers.0.") for name in qwen_drafter.state_dict()}
    if qwen_drafter.kind == "eagle3":
        # Without it `speculators` drafts with noise.
        assert torch.equal(tensors["embed_tokens.weight"], qwen_target.embedding.weight)
        assert config["embed_requires_grad"] is False
        names.add("embed_tokens.weight")
    assert tensors.keys() == names


def test_a_speculators_folder_needs_the_targets_embedding(qwen_target, target_folder, tmp_path):
    """Of a target whose config alone is there it cannot be had; a drafter with embeddings of its own needs none."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((target_folder / "config.json").read_text())
    tiny_drafter("eagle3", qwen_target).save_pretrained(tmp_path / "flat")
    with pytest.raises(InputError, match="holds the target's embedding, but .* has none of 48 × 32"):
        export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(bare))
    assert not (tmp_path / "spec").exists()
    tiny_drafter("eagle3", qwen_target, own_embeddings=True).save_pretrained(tmp_path / "own")
    export_drafter(str(tmp_path / "own"), str(tmp_path / "spec"), "speculators", target=str(bare))
    again = export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), "eagle3")
    assert torch.equal(again.embed_tokens.weight, load_drafter(str(tmp_path / "own")).embed_tokens.weight)


def test_the_embedding_is_found_in_the_shard_of_a_large_target(qwen_target, tmp_path):
    qwen_target.model.save_pretrained(tmp_path / "target", max_shard_size="8KB")
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 1
    tiny_drafter("eagle3", qwen_target).save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(tmp_path / "target"))
    tensors = load_file(tmp_path / "spec" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], qwen_target.embedding.weight)


def test_files_have_the_mode_that_this_process_gives_them(qwen_drafter, target_folder, folder, tmp_path):
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    (tmp_path / "plain").touch()
    files = [*folder.iterdir(), *(tmp_path / "spec").iterdir()]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "plain").stat().st_mode}


def test_export_leaves_what_is_not_its_own(qwen_drafter, folder, tmp_path):
    """A folder beside the new one may be anybody's."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "precious").touch()
    export_drafter(str(folder), str(tmp_path / "out"), qwen_drafter.kind)
    assert (tmp_path / "out.part" / "precious").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"flat", "out", "out.part"}


def test_a_speculators_folder_that_does_not_say_norms_its_residual():
    """As vLLM reads it."""
    layer = {"model_type": "llama", "vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4}
    config = {
        "speculators_config": {"proposal_methods": [{"speculative_tokens": 3}]},
        "transformer_layer_config": layer,
        "draft_vocab_size": 16,
    }
    read = Eagle3Config.from_speculators(config)
    assert read.norm_before_residual is True and read.num_draft_tokens == 3 and read.draft_vocab_size == 16
    assert Eagle3Config.from_speculators({**config, "norm_before_residual": False}).norm_before_residual is False
    assert Eagle3Config.from_speculators({**config, "speculators_config": {"verifier": {}}}).num_draft_tokens == 7
    with pytest.raises(ValueError, match=r"lacks \['speculators_config'\]"):
        Eagle3Config.from_speculators({**config, "speculators_config": None})
    with pytest.raises(ValueError, match="'norm_before_fc': True"):
        Eagle3Config.from_speculators({**config, "norm_before_fc": True})
    with pytest.raises(ValueError, match="'model_type': 'qwen3'"):
        Eagle3Config.from_speculators({**config, "transformer_layer_config": {**layer, "model_type": "qwen3"}})


@pytest.mark.parametrize("name", ["transformer_layer_config", "mask_token_id", "aux_hidden_state_layer_ids"])
def test_a_speculators_config_that_lacks_a_field(name):
    config = {"transformer_layer_config": {}, "block_size": 4, "mask_token_id": 1, "aux_hidden_state_layer_ids": [1]}
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\]"):
        DFlashConfig.from_speculators({key: value for key, value in config.items() if key != name})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dflash_config": {"sample_from_anchor": True}}, "'dflash_config.sample_from_anchor': True"),
        ({"dflash_config": {"attention_value_scale": 0.7}}, "'dflash_config.attention_value_scale': 0.7"),
        ({"dflash_config": {"use_aux_hidden_state": False}}, "'dflash_config.use_aux_hidden_state': False"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "'layer_types'"),
        ({"is_causal": True}, "'is_causal': True"),
        ({"draft_vocab_size": 100}, "'draft_vocab_size': 100"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "'rope_scaling'"),
    ],
)
def test_a_dflash_config_that_asks_for_what_is_not_computed(fields, message):
    with pytest.raises(ValueError, match=message):
        DFlashConfig(**{"num_hidden_layers": 2, **fields})


def test_newer_dflash_folders_keep_the_block_size_inside():
    config = DFlashConfig(num_hidden_layers=2, dflash_config={"block_size": 8, "num_target_layers": 28})
    assert (config.block_size, config.num_target_layers, config.target_layer_ids) == (8, 28, [1, 25])
    assert DFlashConfig(num_hidden_layers=2, num_target_layers=28, dflash_config={"target_layer_ids": None}) == (
        DFlashConfig(num_hidden_layers=2, num_target_layers=28)
    )
    assert config.tie_word_embeddings is False
    assert DFlashConfig(tie_word_embeddings=True).tie_word_embeddings is False


# -- what export refuses and settles -------------------------------------------------------------------------------


def test_export_settles_what_the_config_leaves_open(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    _edit(folder, max_position_embeddings=64)
    assert load_drafter(str(folder)).config.max_position_embeddings == 64
    kind = qwen_drafter.kind
    written = export_drafter(str(folder), str(tmp_path / "out"), kind, target=str(target_folder), dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 256
    assert {parameter.dtype for parameter in written.parameters()} == {torch.bfloat16}
    # In a run the drafter is bound to its target, which settles the same.
    assert load_drafter(str(folder)).bind(qwen_target).config.max_position_embeddings == 256


def test_export_refuses(qwen_drafter, target_folder, folder, tmp_path):
    other = {"dflash": "eagle3", "eagle3": "dflash"}[qwen_drafter.kind]
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=f"kind {qwen_drafter.kind}, which cannot be written as '{other}'"):
        export_drafter(str(folder), out, other)
    with pytest.raises(ValueError, match="names its target.*give `target`"):
        export_drafter(str(folder), out, "speculators")
    with pytest.raises(FileExistsError, match="not empty. Give a new folder"):
        export_drafter(str(folder), str(folder), qwen_drafter.kind)
    _edit(folder, vocab_size=50)
    tensors = load_file(folder / "model.safetensors")
    if "t2d" in tensors:
        save_file({**tensors, "t2d": torch.nn.functional.pad(tensors["t2d"], (0, 2))}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="vocab_size 50 is not the target's 48"):
        export_drafter(str(folder), out, qwen_drafter.kind, target=str(target_folder))
    assert not (tmp_path / "out").exists()


# -- the code that travels with a folder ---------------------------------------------------------------------------

ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("draft_opd_trl", "trl"):
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocker())

from types import SimpleNamespace

import torch
from transformers import AutoModel, AutoModelForCausalLM

target_folder, folder, again, job = sys.argv[1:]
drafter = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
model = AutoModelForCausalLM.from_pretrained(target_folder)
config, embedding = model.config, model.get_input_embeddings()
sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "num_layers": config.num_hidden_layers}
lent = {"embedding": embedding, "embed": embedding, "head": model.get_output_embeddings()}
drafter.bind(SimpleNamespace(name="the target", config=config, **sizes, **lent))

prompt = torch.load(job)
states = model(prompt, output_hidden_states=True).hidden_states
features = torch.cat([states[index + 1] for index in drafter.target_layer_ids], dim=-1)
state = drafter.start(1, 64)
positions = torch.arange(prompt.shape[1])[None]
drafter.extend(state, features, positions, prompt)
anchor = torch.tensor([[prompt.shape[1] - 1]])
proposal = drafter.propose(state, prompt[:, -1:], anchor, prompt.shape[1], lambda logits: (logits.argmax(-1), None))
drafter.save_pretrained(again)
text = None
if drafter.kind == "dflash":
    options = {"max_new_tokens": 20, "do_sample": False}
    text = model.generate(prompt, assistant_model=drafter, speculation_type="dflash", **options)
assert not any(name.startswith("draft_opd_trl") for name in sys.modules)
torch.save({"state": drafter.state_dict(), "tokens": proposal.tokens, "text": text}, job)
"""


ALONE_IN = (
    ALONE[: ALONE.index("target_folder, folder")]
    + """
drafter, told = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(told.values())
torch.save(drafter.state_dict(), sys.argv[2])
"""
)


def test_the_shipped_folders_load_where_this_package_is_not(shipped, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE_IN, str(shipped), str(tmp_path / "state")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state, stored = torch.load(tmp_path / "state"), load_file(shipped / "model.safetensors")
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)


def test_the_shipped_code_is_the_packages(shipped):
    """Otherwise renew it: `python examples/pocket/build.py code`."""
    code = travelling_code(type(load_drafter(str(shipped))).__module__)
    assert {path.name: path.read_text() for path in shipped.glob("*.py")} == code


@torch.no_grad()
def assert_drafts_alone(drafter, target, target_folder, tmp_path):
    """Saved, a drafter proposes the same in a process without this package, also of the text that it writes there."""
    drafter.save_pretrained(tmp_path / "drafter")
    prompt = torch.arange(3, 12)[None]
    torch.save(prompt, tmp_path / "job")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    arguments = [str(path) for path in (target_folder, tmp_path / "drafter", tmp_path / "again", tmp_path / "job")]
    command = [sys.executable, "-c", ALONE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "job")
    assert there["state"].keys() == drafter.state_dict().keys()
    assert all(torch.equal(value, there["state"][name]) for name, value in drafter.state_dict().items())
    # The same by hand in this process; the anchor is the prompt's last token.
    features, _ = target.forward_text(prompt, drafter.target_layer_ids)
    state, length = drafter.start(1, 64), prompt.shape[1]
    drafter.extend(state, features, torch.arange(length)[None], prompt)
    here = drafter.propose(state, prompt[:, -1:], torch.tensor([[length - 1]]), length, Chooser())
    assert torch.equal(there["tokens"], here.tokens)
    if there["text"] is not None:
        assert torch.equal(there["text"], target.model.generate(prompt, max_new_tokens=20, do_sample=False))
    # Saved again from there, the folder is the same, code included.
    names = {path.name for path in (tmp_path / "drafter").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "drafter" / name).read_bytes()
    _assert_same(target, drafter, load_drafter(str(tmp_path / "again")))


def test_a_folder_loads_where_this_package_is_not(qwen_target, target_folder, kind, tmp_path):
    assert_drafts_alone(tiny_drafter(kind, qwen_target), qwen_target, target_folder, tmp_path)


def test_what_travels_is_what_drafting_needs(kind, qwen_target, tmp_path):
    """No target, no cache, no records, no sampling; and transformers finds every file."""
    drafter = tiny_drafter(kind, qwen_target)
    drafter.save_pretrained(tmp_path)
    main = tmp_path / f"{type(drafter).__module__.rpartition('.')[2]}.py"
    files = {path.name for path in tmp_path.glob("*.py")}
    assert files == {main.name, *(Path(file).name for file in get_relative_import_files(main))}
    assert not {"target.py", "cache.py", "records.py", "sampling.py"} & files


@pytest.mark.parametrize("options", [{}, {"own_embeddings": True}, {"hidden_size": 16}, {"draft_token_ids": None}])
def test_from_pretrained_reads_what_save_pretrained_wrote(qwen_target, kind, options, tmp_path):
    drafter = tiny_drafter(kind, qwen_target, **(options if kind == "eagle3" else {}))
    drafter.save_pretrained(tmp_path)
    plain = CONFIG_MAPPING[drafter.config.model_type].from_pretrained(tmp_path)
    for config in (None, plain):
        _assert_same(qwen_target, drafter, type(drafter).from_pretrained(tmp_path, config=config).eval())
    loaded, told = type(drafter).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(drafter) and not any(told.values())


def test_from_pretrained_is_strict(qwen_drafter, folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="norm.weight"):
        type(qwen_drafter).from_pretrained(folder)


def test_the_code_in_a_folder(qwen_drafter, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": f"{qwen_drafter.kind}.{type(qwen_drafter).__name__}"}
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert f"{qwen_drafter.kind}_config.py" in code
    assert not any("import draft_opd_trl" in source or "from .." in source for source in code.values())
