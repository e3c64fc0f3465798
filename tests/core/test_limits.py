"""
Every field of every dataclass of settings, given what it must not be: refused by name in one line, or on the list of
what is right for it. And what is right everywhere: NumPy's numbers, whole numbers for fractions, paths for text.
"""

import dataclasses
import math
import typing
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ANY_KIND

from draft_opd_trl.commands.evaluate import EvaluateArguments
from draft_opd_trl.commands.export import ExportArguments
from draft_opd_trl.commands.init import InitArguments
from draft_opd_trl.commands.inspect import InspectArguments
from draft_opd_trl.commands.options import AdapterArguments, QuantizationArguments
from draft_opd_trl.commands.plan import PlanArguments
from draft_opd_trl.commands.texts import TextsArguments
from draft_opd_trl.commands.trace import TraceArguments
from draft_opd_trl.commands.train import TrainArguments
from draft_opd_trl.core.errors import UserError
from draft_opd_trl.core.limits import LIMITS
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.speculation import SpeculationSettings
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.config import DraftOPDConfig
from draft_opd_trl.training.divergences import LossSettings
from draft_opd_trl.training.streams import StreamSettings


PAIR = {"model_name_or_path": "drafter", "teacher_model_name_or_path": "target"}
# What makes each of them.
CLASSES = {
    DraftOPDConfig: {"output_dir": "out", "report_to": "none"},
    SamplingParams: {},
    SpeculationSettings: {"max_new_tokens": 8, "stop_token_ids": [0]},
    StreamSettings: {},
    OnPolicySettings: {},
    LossSettings: {"kind": "ce", "temperature": 1.0},
    EvaluateArguments: {**PAIR, "suite": ["pocket"]},
    TraceArguments: {**PAIR, "suite": "pocket"},
    TrainArguments: {**PAIR, "dataset_name": "rows.jsonl"},
    PlanArguments: PAIR,
    ExportArguments: {"path": "drafter", "output_dir": "out", "format": ANY_KIND},
    InspectArguments: {"path": "drafter"},
    InitArguments: {"target": "target", "kind": ANY_KIND, "output_dir": "out"},
    TextsArguments: {"logs": ["log.jsonl"], "target": "target", "output_file": "rows.jsonl"},
    QuantizationArguments: {},
    AdapterArguments: {},
}
BAD = {
    "object": object(),
    "bytes": b"x",
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "-0.5": -0.5,
    "0": 0,
    "1.5": 1.5,
    "1e12": 10**12,
    "1e300": 1e300,
    "2**2000": 2**2000,
    "complex": 1j,
    "true": True,
    "empty": "",
    "blank": " \t",
    "text": "x",
    "digits": "5",
    "nul": "a\0b",
    "surrogate": "\ud800",
    "long": "a" * 5000,
    "None": None,
    "[]": [],
    "[object]": [object()],
    "[nan]": [math.nan],
    "{}": {},
    "{1: 2}": {1: 2},
    "{object}": {"a": object()},
    "json": "{a",
    "array": np.zeros(3),
    "fraction": Fraction(3, 2),
}
NUMBERS = ("-1", "-0.5", "0", "1.5", "1e12", "1e300", "2**2000", "fraction")
# Of the numbers above, those that are right. A numeric field that is not here takes none of them.
RIGHT = {
    **dict.fromkeys(
        "learning_rate weight_decay max_grad_norm warmup_steps eval_delay rejected_weight replay_ratio "
        "accepted_weight temperature teacher_temperature sft_learning_rate sft_epochs state_store_gib".split(),
        {"0", "1.5", "fraction"},
    ),
    **dict.fromkeys(
        "adam_beta1 adam_beta2 label_smoothing_factor seed data_seed dataloader_num_workers server_max_retries "
        "num_texts_to_check top_k rejected_decay beta lmbda lmbda_end replay_buffer_size pad_token_id "
        "num_eval_prompts lora_dropout held_out sft_steps".split(),
        {"0"},
    ),
    **dict.fromkeys(
        "num_train_epochs server_timeout loss_max_clamp max_clamp device_memory acceptance_length".split(),
        {"1.5", "fraction"},
    ),
    "max_steps": {"-1"},
    "local_rank": {"-1", "0"},
    "log_prob_min_clamp": {"-1", "-0.5"},
}
# Text that stands for itself: a name of something that only others know.
NAMES = (
    "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id hub_token hub_model_id hub_revision "
    "length_column_name server_model server_token optim_target_modules dataset_config dataset_train_split target_name "
    "revision format kind include_for_metrics label_names lora_target_modules"
).split()
PATHS = (
    "output_dir resume_from_checkpoint text_cache_dir model_name_or_path teacher_model_name_or_path compare path "
    "target dataset_name suite suite_path output_file from_drafter prompts logs state_store_dir served_model"
).split()
# What is right beyond that, each for a reason.
ALSO = {
    "debug": {"empty", "blank", "[]", "None"},  # no options
    "report_to": {"[]", "None"},  # no trackers
    "fsdp": {"empty", "blank", "[]", "true"},  # off, or all of its defaults
    "include_num_input_tokens_seen": {"true"},
    "resume_from_checkpoint": {"true"},  # the newest one
    "stop_token_ids": {"[]", "0"},  # none: texts that end by their length alone
    **dict.fromkeys(
        "suite_path set optim_target_modules label_names include_for_metrics lora_target_modules "
        "serve_batch_sizes".split(),
        {"[]"},
    ),
    "teacher_model_init_kwargs": {"{object}"},  # such as a quantisation config
}
# What is right by itself, but not with the other settings as they are, or not on every machine.
NEEDS_MORE = {
    **dict.fromkeys(
        "bf16 fp16 tf32 use_liger_kernel load_best_model_at_end dataloader_persistent_workers sample_proposals "
        "replay_by_loss".split(),
        {"true"},
    ),
    **dict.fromkeys(("model_name_or_path", "teacher_model_name_or_path"), {"None"}),  # unless an engine is measured
    **dict.fromkeys(("state_store_dir",), {"text", "digits", "json"}),
    "accepted_weight": {"0"},
    "replay_ratio": {"1.5", "fraction"},
}
FIELDS = [(kind, field) for kind in CLASSES for field in dataclasses.fields(kind)]


def _parts(kind, name):
    hint = typing.get_type_hints(kind)[name]
    return {hint, *typing.get_args(hint)}


def _is_right(kind, name, label):
    parts = _parts(kind, name)
    asking = (EvaluateArguments, TraceArguments, InitArguments, TextsArguments)
    if name == "chat_template_kwargs" and kind in asking:
        # Text or a mapping, which is read with the data.
        return label in ("text", "digits", "json", "long", "{}", "{1: 2}", "{object}")
    if label in ALSO.get(name, ()) and (name, kind) != ("suite_path", TraceArguments):
        return True
    if label == "None":
        return type(None) in parts
    if label == "true":
        return bool in parts
    if label == "{}":
        return any(part is dict or typing.get_origin(part) is dict for part in parts)
    if (name in NAMES or name in PATHS) and (name, kind) != ("kind", LossSettings):
        return label in ("text", "digits", "json", *(["long"] if name in NAMES else []))
    return label in NUMBERS and label in RIGHT.get(name, ())


def _as_given(kind, name, value):
    """In a list, where the field holds one."""
    lists = any(typing.get_origin(part) in (list, Sequence) for part in _parts(kind, name) - {str | list[str]})
    only = lists and not typing.get_type_hints(kind)[name] == (str | list[str] | None) and name != "report_to"
    return [value] if only and name != "debug" and not isinstance(value, list | dict) and value is not None else value


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field.name}" for kind, field in FIELDS])
def test_a_field_refuses_what_it_must_not_be(kind, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, value in BAD.items():
        try:
            kind(**{**CLASSES[kind], field.name: _as_given(kind, field.name, value)})
        except UserError as error:
            told = str(error)
            assert field.name in told and "\n" not in told and len(told) < 1000, told
            assert not _is_right(kind, field.name, label) or label in NEEDS_MORE.get(field.name, ()), told
        else:
            assert _is_right(kind, field.name, label), f"{kind.__name__}({field.name}={value!r:.40}) was accepted"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_number_has_a_range(kind):
    numeric = [
        name
        for name, hint in typing.get_type_hints(kind).items()
        if {int, float} & {hint, *typing.get_args(hint)} and not name.startswith("_")
    ]
    assert [
        name for name in numeric if name in {f.name for f in dataclasses.fields(kind)} and name not in LIMITS
    ] == []


def test_no_range_is_of_a_field_that_does_not_exist():
    assert set(LIMITS) - {field.name for _, field in FIELDS} == set()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_defaults_and_copies_pass(kind):
    made = kind(**CLASSES[kind])
    copied = dataclasses.replace(made)
    names = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in names if getattr(made, name) != getattr(copied, name)] == []


def test_what_means_the_same_is_taken():
    config = DraftOPDConfig(Path("out"), report_to=[], learning_rate=1, lmbda=np.float32(0.5), num_anchors=np.int64(3))
    assert (config.output_dir, config.learning_rate, config.lmbda, config.num_anchors) == ("out", 1, 0.5, 3)
    assert type(config.num_anchors) is int and type(config.lmbda) is float
    assert DraftOPDConfig("out", report_to=[], truncate_prompts=np.bool_(True)).truncate_prompts is True
    assert SpeculationSettings(8, (1, 2)).stop_token_ids == [1, 2]


@pytest.mark.parametrize("name", ["num_anchors", "lmbda", "seed", "temperature", "max_steps"])
def test_a_boolean_is_no_number_and_a_number_no_boolean(name):
    with pytest.raises(TypeError, match=f"`{name}` is True, of type bool; it must be"):
        DraftOPDConfig("out", report_to=[], **{name: True})
    with pytest.raises(TypeError, match="`truncate_prompts` is 1, of type int; it must be true or false"):
        DraftOPDConfig("out", report_to=[], truncate_prompts=1)
