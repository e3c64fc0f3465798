"""Drafter folders in SGLang's and vLLM's own loaders, on a CPU; `make test-serving` runs this, `make test` does not.

Each engine gets an environment of its own. Where it cannot be built, its tests are skipped with the reason.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from environments import run_driver
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from draft_opd_trl import DRAFTERS, SamplingParams, Target, create_drafter, load_drafter
from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.drafters import Drafter, DrafterConfig
from draft_opd_trl.folders.checkpoints import drafter_class_of, export_drafter, read_config
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.texts.engine_counts import Verified
from draft_opd_trl.texts.server import Answer, CompletionsClient, read_answer


POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket"
NAME = "an/id"  # `vllm serve FOLDER` takes no path for the target's name.
ENGINES = ("sglang", "vllm")
pytestmark = pytest.mark.timeout(3600)  # Building an environment downloads some 600 MB.
# What each engine lends of the target, or fills where a folder ships it (vLLM's separate mask embedding).
LENT = {
    ("sglang", "dflash"): [],
    ("sglang", "eagle3"): ["model.embed_tokens.weight"],
    ("vllm", "dflash"): ["lm_head.weight", "model.embed_tokens.weight", "model.mask_embedding"],
    ("vllm", "eagle3"): ["model.embed_tokens.weight"],
    ("sglang", "dspark"): [],
    ("vllm", "dspark"): ["lm_head.weight", "model.embed_tokens.weight", "model.mask_embedding"],
    ("sglang", "causal_lm"): [],
    ("vllm", "causal_lm"): [],
}
# Drafters made for the pocket target, and options of `create_drafter`.
MADE = {
    "dflash-layers": ("dflash", {"mask_token_id": 5, "num_hidden_layers": 2, "target_layer_ids": [0, 2]}),
    "eagle3-part": ("eagle3", {"draft_token_ids": list(range(0, 1024, 2))}),
    "eagle3-whole": ("eagle3", {}),
    "eagle3-norms": ("eagle3", {"fc_norm": True, "norm_output": True}),
    "dspark-made": ("dspark", {"mask_token_id": 5, "num_hidden_layers": 2, "target_layer_ids": [0, 2]}),
    "dspark-unsure": ("dspark", {"mask_token_id": 5, "num_hidden_layers": 1, "enable_confidence_head": False}),
    "dspark-alone": ("dspark", {"mask_token_id": 5, "num_hidden_layers": 1, "confidence_head_with_markov": False}),
    "dspark-behind": ("dspark", {"mask_token_id": 5, "num_hidden_layers": 1, "sample_from_anchor": False}),
    "causal_lm-made": ("causal_lm", {"num_hidden_layers": 2}),
    "causal_lm-untied": ("causal_lm", {"num_hidden_layers": 1, "tie_word_embeddings": False}),
}
# Drafters of which inspection says that an engine does not compute them, and changes of others' configs likewise.
ODD = {
    "eagle3-residual": ("eagle3", {"norm_before_residual": True}),
    "eagle3-biased": ("eagle3", {"attention_bias": True}),
    "dflash-gelu": ("dflash", {"mask_token_id": 5, "num_hidden_layers": 1, "hidden_act": "gelu"}),
    "eagle3-gelu": ("eagle3", {"hidden_act": "gelu"}),
    "dspark-gated": ("dspark", {"mask_token_id": 5, "num_hidden_layers": 1, "markov_head_type": "gated"}),
    "dspark-rnn": ("dspark", {"mask_token_id": 5, "num_hidden_layers": 1, "markov_head_type": "rnn"}),
}


def _into_dflash_config(*names, **others):
    """Fields of a flat DSpark folder moved to where SpecForge keeps them."""

    def change(config):
        config["dflash_config"] = {**{name: config.pop(name) for name in names}, **others}

    return change


CHANGES = {
    "plain Llama": ("eagle3-part", lambda config: config.update(architectures=["LlamaForCausalLM"])),
    "no draft_vocab_size": ("eagle3-whole", lambda config: config.pop("draft_vocab_size")),
    "SGLang's taps alone": ("eagle3-part", lambda config: config.pop("eagle_aux_hidden_state_layer_ids")),
    "vLLM's taps alone": ("eagle3-part", lambda config: config.pop("eagle_config")),
    "no taps": ("dflash-gelu", lambda config: config.update(hidden_act="silu", dflash_config={"mask_token_id": 5})),
    "rope_theta alone": ("dflash-layers", lambda config: config.pop("rope_parameters")),
    "rope_parameters alone": ("eagle3-part", lambda config: config.pop("rope_theta")),
    "SpecForge's heads": (
        "dspark-made",
        _into_dflash_config(
            *("mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type"),
            *("enable_confidence_head", "confidence_head_with_markov"),
            projector_type="dspark",
        ),
    ),
    "SpecForge's taps": ("dspark-made", _into_dflash_config("mask_token_id", "target_layer_ids", "num_target_layers")),
    "SpecForge's slots": ("dspark-behind", _into_dflash_config("sample_from_anchor")),
    "SpecForge's architecture": ("dspark-made", lambda config: config.update(architectures=["DSparkDraftModel"])),
    "no sample_from_anchor": ("dspark-made", lambda config: config.pop("sample_from_anchor")),
    "no block_size": ("dspark-made", lambda config: config.pop("block_size")),
    "no markov_rank": ("dspark-made", lambda config: config.pop("markov_rank")),
    "no markov_head_type": ("dspark-made", lambda config: config.pop("markov_head_type")),
    "no enable_confidence_head": ("dspark-made", lambda config: config.pop("enable_confidence_head")),
    "no confidence_head_with_markov": ("dspark-made", lambda config: config.pop("confidence_head_with_markov")),
    "model_type dspark": ("dspark-made", lambda config: config.update(model_type="dspark")),
}
SHIPPED = sorted(path.name for path in POCKET.glob("drafter-*") if (path / "config.json").is_file())
# A text of four blocks, and how an engine is asked to tell of it.
ACCEPTED = [1, 0, 1, 2]
ASKED = CompletionsClient("http://localhost", SamplingParams(), 64, [2], str)._body_of_ids([1, 2, 3], seed=0)
# Kernels round bfloat16 in other places than ours; in float32 nothing but the order of sums is left.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def edit(folder: Path, change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_tables(folder: Path) -> Path:
    """Those of a draft vocabulary that is the pocket target's whole one."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"d2t": torch.zeros(1024, dtype=torch.long), "t2d": torch.ones(1024, dtype=torch.bool)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _other_tap(config):
    """The first tap one layer further, in every spelling."""
    for fields, name in (
        (config.get("dflash_config", {}), "target_layer_ids"),
        (config, "target_layer_ids"),
        (config, "eagle_aux_hidden_state_layer_ids"),
        (config.get("eagle_config", {}), "eagle_aux_hidden_state_layer_ids"),
    ):
        if fields.get(name):
            fields[name][0] = (fields[name][0] + 1) % 3


def _other_rope(config):
    config["rope_parameters"]["rope_theta"] = 5e5
    if "rope_theta" in config:
        config["rope_theta"] = 5e5


FAULTS = {"other tap": _other_tap, "other rope": _other_rope}


def _faults(kind: str) -> list[str]:
    """Those that a drafter of this kind can have."""
    taps = DRAFTERS[kind].target_layer_ids is not Drafter.target_layer_ids
    return [fault for fault in FAULTS if taps or fault != "other tap"]


def _launch(drafter: Drafter) -> dict:
    """What each engine is told of a drafter, under the names of its own settings."""
    told = (drafter.kind, drafter.num_draft_tokens)
    sglang = {}
    for flag in drafter.config.sglang_flags(*told):
        name, value = flag.removeprefix("--").replace("-", "_").split()
        sglang[name] = int(value) if value.isdigit() else value
    return {"sglang": sglang, "vllm": drafter.config.vllm_config(*told)}


@torch.no_grad()
def ours(folder: Path, dtype: str) -> dict:
    """A block drafted here, and all that an engine needs to draft the same."""
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=getattr(torch, dtype))
    target = Target(model)
    drafter = load_drafter(str(folder), dtype).bind(target)
    tokens = torch.randint(10, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    length, proposals = tokens.shape[1], drafter.num_draft_tokens
    features, _ = target.forward_text(tokens, drafter.target_layer_ids)
    state = drafter.start(1, 64)
    drafter.extend(state, features, torch.arange(length)[None], tokens)
    anchor = torch.tensor([[length - 1]])
    drafted = drafter.propose(state, tokens[:, -1:], anchor, length, Chooser()).tokens[0]
    blocks = DraftBlocks(*torch.tensor([[0], [length - 1]]), drafted, *torch.tensor([[0], [proposals]]))
    states = drafter.draft(features, tokens, blocks)[0]
    logits = drafter.logits(states)
    if drafter.vocab_map is not None:
        logits = logits.new_full((proposals, target.vocab_size), -torch.inf).index_copy_(1, drafter.vocab_map, logits)
    return {
        "target": str(POCKET / "target"),
        "kind": drafter.kind,
        "launch": _launch(drafter),
        "dtype": dtype,
        "trust_remote_code": False,
        "tokens": tokens[0],
        "draft_tokens": drafted[0],
        "hidden_states": torch.stack(model.model(tokens, output_hidden_states=True).hidden_states)[:, 0],
        "embedding": target.embedding.weight.data,
        "head": target.head.weight.data,
        "logits": logits,
        "confidence": drafter.confidence_head(states) if hasattr(drafter, "confidence_head") else None,
        "taps": [index + 1 for index in drafter.target_layer_ids],
        "accepted": ACCEPTED,
        "asked": ASKED,
    }


def make_folders(root: Path, made: dict) -> dict[str, Path]:
    """The shipped folders, and new ones with weights that are not zero anywhere."""
    target = Target(AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32))
    folders = {name: POCKET / name for name in SHIPPED}
    for name, (kind, options) in made.items():
        torch.manual_seed(0)
        drafter = create_drafter(kind, target, **options)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        folders[name] = root / name
        drafter.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    folders = make_folders(root, {**MADE, **ODD})
    jobs = {}
    odd = {name: folders.pop(name) for name in ODD}
    for name, (base, change) in CHANGES.items():
        odd[name] = edit(shutil.copytree({**folders, **odd}[base], root / name), change)
    odd["tables"] = add_tables(shutil.copytree(folders["eagle3-whole"], root / "tables"))
    for name, folder in odd.items():
        jobs[f"odd: {name}"] = {**ours(folder, "float32"), "folder": str(folder)}
    for name, folder in folders.items():
        for dtype in TOLERANCE if name in SHIPPED else ["float32"]:
            jobs[f"{name}, {dtype}"] = {**ours(folder, dtype), "folder": str(folder)}
        right = jobs[f"{name}, float32"]
        jobs[f"{name}, remote code"] = {**right, "trust_remote_code": True}
        if name in IN_SPECULATORS:
            spec = root / f"{name}-speculators"
            export_drafter(str(folder), str(spec), "speculators", target=str(POCKET / "target"), target_name=NAME)
            jobs[f"{name}, speculators"] = {**right, "folder": str(spec)}
        for fault in _faults(right["kind"]):
            wrong = shutil.copytree(folder, root / f"{name}-{fault}")
            jobs[f"{name}, {fault}"] = {**right, "folder": str(edit(wrong, FAULTS[fault]))}
        partial = shutil.copytree(folder, root / f"{name}-partial")
        tensors = load_file(partial / "model.safetensors")
        del tensors[_norm(name)]
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        jobs[f"{name}, missing tensor"] = {**right, "folder": str(partial)}
    return jobs


@pytest.fixture(scope="session", params=ENGINES)
def engine(request, jobs, tmp_path_factory):
    """Name, and what the engine made of every job; one process, because importing an engine takes longest."""
    files = [tmp_path_factory.mktemp(request.param) / name for name in ("jobs", "results")]
    ours = ("logits", "confidence")
    torch.save({name: {k: v for k, v in job.items() if k not in ours} for name, job in jobs.items()}, files[0])
    run_driver(request.param, f"{request.param}_driver.py", *files)
    return request.param, torch.load(files[1])


def relative_error(job, result):
    assert "error" not in result, result["error"]
    ours, theirs = job["logits"].float(), result["logits"].float()
    finite = ours.isfinite()
    assert torch.equal(finite, theirs.isfinite())
    return float((ours[finite] - theirs[finite]).norm() / ours[finite].norm())


def kind(name: str) -> str:
    return MADE[name][0] if name in MADE else drafter_class_of(read_config(POCKET / name), name).kind


def _norm(name: str) -> str:
    """The name of the last norm's weight, in a drafter's folder and in error messages."""
    return "norm.weight" if DRAFTERS[kind(name)].code_travels else "model.norm.weight"


NAMES = [*SHIPPED, *MADE]
IN_SPECULATORS = [
    name for name in NAMES if DRAFTERS[kind(name)].config_class.to_speculators is not DrafterConfig.to_speculators
]
RIGHT = [f"{name}, {dtype}" for name in SHIPPED for dtype in TOLERANCE] + [f"{name}, float32" for name in MADE]
RIGHT += [f"{name}, remote code" for name in NAMES]
JUDGED = [f"{name}, speculators" for name in IN_SPECULATORS] + [f"odd: {name}" for name in [*ODD, *CHANGES, "tables"]]


@pytest.mark.parametrize("name", RIGHT)
def test_the_engine_drafts_what_we_draft(engine, jobs, name):
    engine, results = engine
    job, result = jobs[name], results[name]
    error = relative_error(job, result)
    print(f"{engine}: {name}: relative error {error:.2g}")
    assert error <= TOLERANCE[job["dtype"]]
    assert result["unset"] == LENT[engine, job["kind"]]
    assert result["taps"] == job["taps"]
    if job["dtype"] == "float32":
        assert torch.equal(result["logits"].argmax(-1), job["draft_tokens"])
        if (ours := job["confidence"]) is not None:
            assert torch.allclose(result["confidence"], ours, rtol=1e-4, atol=1e-4)
        elif engine == "sglang" and job["kind"] == "dspark":
            # Where verification is cut short by confidence, SGLang wants the head, whatever the config says.
            assert "the checkpoint is missing ['confidence_head.proj" in result["confidence"]
    if engine == "sglang":
        proposals = len(job["draft_tokens"])
        assert result["verified"] == proposals + 1
        verified = Verified(4, [3, 1, *[0] * (proposals - 2)], proposals)
        assert read_answer(result["answer"].encode()) == Answer("a b", list(range(9)), True, 2, 9, verified)


@pytest.mark.parametrize("name", JUDGED)
def test_inspection_says_what_the_engine_does(engine, jobs, name):
    engine, results = engine
    job, result = jobs[name], results[name]
    told = inspect_drafter(job["folder"], job["target"])
    error = None if "error" in result else relative_error(job, result)
    print(f"{engine}: {name}: relative error {error}")
    works = (
        error is not None and error <= TOLERANCE["float32"] and set(result["unset"]) <= set(LENT[engine, job["kind"]])
    )
    assert told["loads"]["draft_opd_trl"]
    assert told["loads"][{"sglang": "SGLang", "vllm": "vLLM"}[engine]] == works, (told["faults"], result.get("error"))


@pytest.mark.parametrize("name", IN_SPECULATORS)
def test_vllm_serves_a_speculators_folder_by_itself(engine, jobs, name):
    """`vllm serve FOLDER`: the target, its tokenizer, and how to speculate all come from the folder."""
    engine, results = engine
    if engine != "vllm":
        pytest.skip("SGLang does not read speculators folders")
    job = jobs[f"{name}, speculators"]
    model, _, speculation = results[f"{name}, speculators"]["served"]
    assert model == NAME
    assert speculation["method"] == job["kind"] and speculation["model"] == job["folder"]
    assert speculation["num_speculative_tokens"] == len(job["draft_tokens"])


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in NAMES for fault in _faults(kind(name))])
def test_a_wrong_folder_is_seen(engine, jobs, name, fault):
    """The comparison above can fail, in each dtype in which it is made."""
    _, results = engine
    bound = TOLERANCE["bfloat16"] if name in SHIPPED else 100 * TOLERANCE["float32"]
    assert relative_error(jobs[f"{name}, {fault}"], results[f"{name}, {fault}"]) > bound


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_silent_there_and_an_error_here(engine, jobs, name):
    engine, results = engine
    job, result = jobs[f"{name}, missing tensor"], results[f"{name}, missing tensor"]
    if engine == "vllm" and not DRAFTERS[job["kind"]].code_travels:
        # Of a whole language model vLLM misses what is not there.
        assert "not initialized from checkpoint: {'model.norm.weight'}" in result["error"]
    else:
        assert "error" not in result, result["error"]
        lent = LENT[engine, job["kind"]]
        unset = [parameter.removeprefix("model.") for parameter in result["unset"] if parameter not in lent]
        assert unset == ["norm.weight"]
    with pytest.raises(ValueError, match=rf"Missing: \['{_norm(name)}'\]"):
        load_drafter(job["folder"])
