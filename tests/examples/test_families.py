"""Families of targets: some twenty of them, hybrids among them, and the page that tells of all."""

import importlib
import json
import re

import pytest
from conftest import ROOT

from draft_opd_trl.folders.known_families import known_families


RESULTS = ROOT / "docs" / "source" / "results" / "families.json"
TRIED = (
    "bamba cohere deepseek_v3 falcon gemma2 gemma4_text glm4_moe gpt2 gpt_oss granite jamba kimi_linear lfm2 "
    "llama4_text mamba2 mixtral modernbert-decoder olmo2 opt phi3 qwen3_5_text qwen3_next stablelm zamba2"
).split()


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("families")


@pytest.mark.parametrize("family", TRIED)
def test_a_family_is_a_target_for_every_use(families, family):
    """All of these by everything but bitsandbytes, and as the table has it."""
    found = families.try_family(family)
    lacking = {use: found.get(use) for use in families.USES if not families.works(found, use)}
    assert lacking.keys() <= {"quantised"}, lacking
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    if found["transformers"] == recorded[family]["transformers"]:
        assert families.known({family: found}) == families.known({family: recorded[family]})


def test_the_page_has_the_table_of_the_results(families):
    page = (ROOT / "docs" / "source" / "targets.md").read_text(encoding="utf-8")
    assert families.table(json.loads(RESULTS.read_text(encoding="utf-8"))) in page


def test_the_package_tells_what_the_results_hold(families):
    assert families.known(json.loads(RESULTS.read_text(encoding="utf-8"))) == known_families()


def test_no_family_fails_by_a_fault_of_ours():
    """What cannot be used is refused in a sentence, when it is loaded."""
    families = json.loads(RESULTS.read_text(encoding="utf-8"))
    bare = r"\w*(AttributeError|IndexError|KeyError)\b"
    cells = [(name, use, said) for name, found in families.items() for use, said in found.items()]
    assert [cell for cell in cells if isinstance(cell[2], str) and re.match(bare, cell[2])] == []


def test_what_went_wrong_is_told(families):
    found = families.try_family("cpmant")
    assert "no decoder that reads from left to right" in found["target"]
    assert (
        not found["decoder_only"] and not families.works(found, "target") and not families.works(found, "speculation")
    )
