"""What is said of a target's family before its weights are read."""

import pytest
import transformers
from conftest import tiny_model
from transformers import AutoConfig

from draft_opd_trl.core.errors import InputError
from draft_opd_trl.folders.known_families import check_family, known_families, told_of_family
from draft_opd_trl.folders.target_folder import read_target_config


def test_every_family_is_told_of():
    known = known_families()
    assert "every use works" in told_of_family("llama") and "reads the block" in told_of_family("llama")
    assert "the run and the block" in told_of_family("qwen3_next")
    assert "the whole text" in told_of_family("mamba")
    for family, sentence in known["refused"].items():
        assert sentence in told_of_family(family) and "is refused" in told_of_family(family)
    for family, lacks in known["lacks"].items():
        assert all(f"no {use} (" in told_of_family(family) for use in lacks)
    assert "not among the families" in told_of_family("none_such")


def test_a_refused_family_is_refused_by_its_config(monkeypatch, tmp_path):
    config = AutoConfig.for_model("cpmant")
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers, "__version__", known_families()["transformers"])
    with pytest.raises(InputError, match="no decoder that reads from left to right.*Found when cpmant was tried"):
        read_target_config(str(tmp_path))
    # Another version may have mended it: then the model itself is asked.
    monkeypatch.setattr(transformers, "__version__", "0.0")
    assert read_target_config(str(tmp_path)).model_type == "cpmant"


def test_other_families_pass():
    check_family(tiny_model("qwen3").config)
