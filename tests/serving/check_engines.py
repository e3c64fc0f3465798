"""Drafter folders in SGLang's and vLLM's own loaders, on a CPU; `make test-serving` runs this, `make test` does not.

Each engine gets an environment of its own. Where it cannot be built, its tests are skipped with the reason.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from draft_opd_trl import Target, create_drafter, load_drafter
from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.folders.checkpoints import export_drafter
from draft_opd_trl.folders.inspection import inspect_drafter


HERE = Path(__file__).resolve().parent
POCKET = HERE.parents[1] / "examples" / "pocket"
CACHE = Path.home() / ".cache" / "draft_opd_trl" / "serving"
TORCH = "torch==2.13.0"
NAME = "an/id"  # `vllm serve FOLDER` takes no path for the target's name.
ENGINES = ("sglang", "vllm")
pytestmark = pytest.mark.timeout(3600)  # Building an environment downloads some 600 MB.
# What each engine lends of the target, or fills where a folder ships it (vLLM's separate mask embedding).
LENT = {
    ("sglang", "dflash"): [],
    ("sglang", "eagle3"): ["model.embed_tokens.weight"],
    ("vllm", "dflash"): ["lm_head.weight", "model.embed_tokens.weight", "model.mask_embedding"],
    ("vllm", "eagle3"): ["model.embed_tokens.weight"],
}
# Drafters made for the pocket target, and options of `create_drafter`.
MADE = {
    "dflash-layers": ("dflash", {"mask_token_id": 5, "num_hidden_layers": 2, "target_layer_ids": [0, 2]}),
    "eagle3-part": ("eagle3", {"draft_token_ids": list(range(0, 1024, 2))}),
    "eagle3-whole": ("eagle3", {}),
    "eagle3-norms": ("eagle3", {"fc_norm": True, "norm_output": True}),
}
# Drafters of which inspection says that an engine does not compute them, and changes of others' configs likewise.
ODD = {
    "eagle3-residual": ("eagle3", {"norm_before_residual": True}),
    "eagle3-biased": ("eagle3", {"attention_bias": True}),
    "dflash-gelu": ("dflash", {"mask_token_id": 5, "num_hidden_layers": 1, "hidden_act": "gelu"}),
    "eagle3-gelu": ("eagle3", {"hidden_act": "gelu"}),
}
CHANGES = {
    "plain Llama": ("eagle3-part", lambda config: config.update(architectures=["LlamaForCausalLM"])),
    "no draft_vocab_size": ("eagle3-whole", lambda config: config.pop("draft_vocab_size")),
    "SGLang's taps alone": ("eagle3-part", lambda config: config.pop("eagle_aux_hidden_state_layer_ids")),
    "vLLM's taps alone": ("eagle3-part", lambda config: config.pop("eagle_config")),
    "no taps": ("dflash-gelu", lambda config: config.update(hidden_act="silu", dflash_config={"mask_token_id": 5})),
    "rope_theta alone": ("dflash-layers", lambda config: config.pop("rope_parameters")),
    "rope_parameters alone": ("eagle3-part", lambda config: config.pop("rope_theta")),
}
SHIPPED = sorted(path.name for path in POCKET.glob("drafter-*") if (path / "config.json").is_file())
# Kernels round bfloat16 in other places than ours; in float32 nothing but the order of sums is left.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def _python(engine: str) -> Path:
    """The engine's environment, built on first use."""
    requirements = HERE / f"requirements-{engine}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + TORCH.encode()).hexdigest()[:12]
    home = CACHE / f"{engine}-{digest}"
    if not (home / "installed").is_file():
        shutil.rmtree(home, ignore_errors=True)
        pip = [home / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        # The engine without its dependencies, most of which are kernels for a GPU.
        for command in ([sys.executable, "-m", "venv", home], [*pip, TORCH], [*pip, "--no-deps", "-r", requirements]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{engine} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        (home / "installed").touch()
    return home / "bin" / "python"


def _edit(folder: Path, change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _other_tap(config):
    """The first tap one layer further, in every spelling."""
    for fields, name in (
        (config.get("dflash_config", {}), "target_layer_ids"),
        (config, "eagle_aux_hidden_state_layer_ids"),
        (config.get("eagle_config", {}), "eagle_aux_hidden_state_layer_ids"),
    ):
        if fields.get(name):
            fields[name][0] = (fields[name][0] + 1) % 3


def _other_rope(config):
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 5e5


@torch.no_grad()
def _ours(folder: Path, dtype: str) -> dict:
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
    logits = drafter.logits(drafter.draft(features, tokens, blocks)[0])
    if drafter.vocab_map is not None:
        logits = logits.new_full((proposals, target.vocab_size), -torch.inf).index_copy_(1, drafter.vocab_map, logits)
    return {
        "target": str(POCKET / "target"),
        "kind": drafter.kind,
        "dtype": dtype,
        "trust_remote_code": False,
        "tokens": tokens[0],
        "draft_tokens": drafted[0],
        "hidden_states": torch.stack(model.model(tokens, output_hidden_states=True).hidden_states)[:, 0],
        "embedding": target.embedding.weight.data,
        "head": target.head.weight.data,
        "logits": logits,
        "taps": [index + 1 for index in drafter.target_layer_ids],
    }


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    target = Target(AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32))
    folders = {name: POCKET / name for name in SHIPPED}
    for name, (kind, options) in {**MADE, **ODD}.items():
        torch.manual_seed(0)
        drafter = create_drafter(kind, target, **options)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        folders[name] = root / name
        drafter.save_pretrained(folders[name])
    jobs = {}
    odd = {name: folders.pop(name) for name in ODD}
    for name, (base, change) in CHANGES.items():
        odd[name] = _edit(shutil.copytree({**folders, **odd}[base], root / name), change)
    odd["tables"] = shutil.copytree(folders["eagle3-whole"], root / "tables")
    tensors = load_file(odd["tables"] / "model.safetensors")
    tensors |= {"d2t": torch.zeros(1024, dtype=torch.long), "t2d": torch.ones(1024, dtype=torch.bool)}
    save_file(tensors, odd["tables"] / "model.safetensors", metadata={"format": "pt"})
    for name, folder in odd.items():
        jobs[f"odd: {name}"] = {**_ours(folder, "float32"), "folder": str(folder)}
    for name, folder in folders.items():
        for dtype in TOLERANCE if name in SHIPPED else ["float32"]:
            jobs[f"{name}, {dtype}"] = {**_ours(folder, dtype), "folder": str(folder)}
        right = jobs[f"{name}, float32"]
        jobs[f"{name}, remote code"] = {**right, "trust_remote_code": True}
        spec = root / f"{name}-speculators"
        export_drafter(str(folder), str(spec), "speculators", target=str(POCKET / "target"), target_name=NAME)
        jobs[f"{name}, speculators"] = {**right, "folder": str(spec)}
        for fault, change in {"other tap": _other_tap, "other rope": _other_rope}.items():
            wrong = shutil.copytree(folder, root / f"{name}-{fault}")
            jobs[f"{name}, {fault}"] = {**right, "folder": str(_edit(wrong, change))}
        partial = shutil.copytree(folder, root / f"{name}-partial")
        tensors = load_file(partial / "model.safetensors")
        del tensors["norm.weight"]
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        jobs[f"{name}, missing tensor"] = {**right, "folder": str(partial)}
    return jobs


@pytest.fixture(scope="session", params=ENGINES)
def engine(request, jobs, tmp_path_factory):
    """Name, and what the engine made of every job; one process, because importing an engine takes longest."""
    python = _python(request.param)
    files = [tmp_path_factory.mktemp(request.param) / name for name in ("jobs", "results")]
    torch.save({name: {k: v for k, v in job.items() if k != "logits"} for name, job in jobs.items()}, files[0])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment["HF_MODULES_CACHE"] = str(files[0].parent / "modules")
    command = [python, HERE / f"{request.param}_driver.py", *files]
    done = subprocess.run(command, env=environment, cwd=files[0].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return request.param, torch.load(files[1])


def _error(job, result):
    assert "error" not in result, result["error"]
    ours, theirs = job["logits"].float(), result["logits"].float()
    finite = ours.isfinite()
    assert torch.equal(finite, theirs.isfinite())
    return float((ours[finite] - theirs[finite]).norm() / ours[finite].norm())


NAMES = [*SHIPPED, *MADE]
RIGHT = [f"{name}, {dtype}" for name in SHIPPED for dtype in TOLERANCE] + [f"{name}, float32" for name in MADE]
RIGHT += [f"{name}, remote code" for name in NAMES]
JUDGED = [f"{name}, speculators" for name in NAMES] + [f"odd: {name}" for name in [*ODD, *CHANGES, "tables"]]


@pytest.mark.parametrize("name", RIGHT)
def test_the_engine_drafts_what_we_draft(engine, jobs, name):
    engine, results = engine
    job, result = jobs[name], results[name]
    error = _error(job, result)
    print(f"{engine}: {name}: relative error {error:.2g}")
    assert error <= TOLERANCE[job["dtype"]]
    assert result["unset"] == LENT[engine, job["kind"]]
    assert result["taps"] == job["taps"]
    if job["dtype"] == "float32":
        assert torch.equal(result["logits"].argmax(-1), job["draft_tokens"])
    if engine == "sglang" and job["kind"] == "dflash":
        assert result["block_size"] == len(job["draft_tokens"]) + 1


@pytest.mark.parametrize("name", JUDGED)
def test_inspection_says_what_the_engine_does(engine, jobs, name):
    engine, results = engine
    job, result = jobs[name], results[name]
    told = inspect_drafter(job["folder"], job["target"])
    error = None if "error" in result else _error(job, result)
    print(f"{engine}: {name}: relative error {error}")
    works = error is not None and error <= TOLERANCE["float32"] and result["unset"] == LENT[engine, job["kind"]]
    assert told["loads"]["draft_opd_trl"]
    assert told["loads"][{"sglang": "SGLang", "vllm": "vLLM"}[engine]] == works, (told["faults"], result.get("error"))


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("fault", ["other tap", "other rope"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_folder_is_seen(engine, jobs, name, fault):
    """The comparison above can fail."""
    _, results = engine
    assert _error(jobs[f"{name}, {fault}"], results[f"{name}, {fault}"]) > TOLERANCE["bfloat16"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_silent_there_and_an_error_here(engine, jobs, name):
    engine, results = engine
    job, result = jobs[f"{name}, missing tensor"], results[f"{name}, missing tensor"]
    assert "error" not in result, result["error"]
    lent = LENT[engine, job["kind"]]
    assert [parameter.removeprefix("model.") for parameter in result["unset"] if parameter not in lent] == [
        "norm.weight"
    ]
    with pytest.raises(ValueError, match=r"Missing: \['norm.weight'\]"):
        load_drafter(job["folder"])
