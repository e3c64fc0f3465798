"""What a kind's config declares by itself, where the kind says nothing."""

import pytest
from conftest import KINDS
from transformers import Qwen3Config

from draft_opd_trl.core.errors import InputError
from draft_opd_trl.drafters import DRAFTERS, DrafterConfig
from draft_opd_trl.folders.serving import ENGINES


class PlainConfig(DrafterConfig, Qwen3Config):
    """A kind that adds one option, and nothing else."""

    @classmethod
    def from_target(cls, target_config, num_layers=1, **options):
        cls.check_options(options)
        return cls(num_hidden_layers=num_layers, **options)


def test_a_kind_that_says_nothing_promises_no_engine():
    assert PlainConfig.served_targets == {} and PlainConfig.card_notes == ""
    assert PlainConfig.layout({}) == "flat"
    assert PlainConfig.engine_faults({}, set()) == []
    assert PlainConfig.sglang_flags("plain", 4) == ["--speculative-algorithm PLAIN"]
    assert PlainConfig.vllm_config("plain", 4) == {"method": "plain", "num_speculative_tokens": 4}


def test_a_kind_that_says_nothing_has_no_speculators_layout():
    with pytest.raises(InputError, match="A PlainConfig has no speculators layout, so this config.json"):
        PlainConfig.from_speculators({})
    with pytest.raises(
        InputError, match="A PlainConfig has no speculators layout. Give the drafter's kind as the format"
    ):
        PlainConfig().to_speculators()
    with pytest.raises(NotImplementedError, match="DrafterConfig has no from_target"):
        DrafterConfig.from_target(None)


def test_options_are_those_of_the_kind_and_fields_of_its_config():
    made = PlainConfig.from_target(None, num_layers=3, initializer_range=0.5)
    assert (made.num_hidden_layers, made.initializer_range) == (3, 0.5)
    with pytest.raises(TypeError, match="has no option 'num_layer'. Did you mean 'num_layers'?"):
        PlainConfig.from_target(None, num_layer=2)
    with pytest.raises(TypeError, match="has no option 'xyzzy'. It takes num_layers, and fields of the config"):
        PlainConfig.from_target(None, xyzzy=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_speaks_of_engines_that_there_are(kind):
    config_class = DRAFTERS[kind].config_class
    assert issubclass(config_class, DrafterConfig) and set(config_class.served_targets) <= set(ENGINES)
    algorithm, *rest = config_class.sglang_flags(kind, 4)
    assert all(flag.startswith("--speculative-") for flag in (algorithm, *rest))
