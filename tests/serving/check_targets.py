"""The table of targets that engines serve, held to the engines' own model classes; `make test-serving` runs this."""

import json

import pytest
from environments import run_driver
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.drafters.parts import KNOWN_TARGETS
from draft_opd_trl.folders.serving import ENGINES


pytestmark = pytest.mark.timeout(3600)  # Building an environment downloads some 600 MB.
# What a kind asks of the target's class; a kind without taps asks nothing.
ASKS = {"dflash": "blocks", "dspark": "blocks", "eagle3": "eagle3"}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    """Name, and by `model_type` what the engine's class of such a target has."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param.lower()
    files = [folder / "asked", folder / "found"]
    asked = {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in sorted(KNOWN_TARGETS)}
    files[0].write_text(json.dumps({"engine": name, "architectures": sorted(set(asked.values()))}))
    run_driver(name, "targets_driver.py", *files)
    found = json.loads(files[1].read_text())
    return request.param, {model_type: found[architecture] for model_type, architecture in asked.items()}


@pytest.mark.parametrize("kind", ASKS)
def test_the_table_says_what_the_engines_classes_have(engine, kind):
    engine, found = engine
    unread = {name: told for name, told in found.items() if isinstance(told, str)}
    assert unread == {}
    has = {name for name, told in found.items() if told and told[ASKS[kind]]}
    assert DRAFTERS[kind].config_class.served_targets[engine] == has
