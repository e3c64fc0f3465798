"""Options that several commands share."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.checks import check_value, read_json, settle, text
from ..core.errors import EnvironmentFault, InputError
from ..core.limits import CHAT_KWARGS, LIMITS


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


def _text_or_any(value: Any) -> str | None:
    return text(value) if isinstance(value, str) else None


def settle_options(arguments: Any, **rules: Any) -> None:
    """[`settle`] for options of a command: YAML gives the chat template's settings as a mapping, the shell as text."""
    hints = {"chat_template_kwargs": dict | str}
    settle(arguments, LIMITS, hints=hints, chat_template_kwargs=_text_or_any, **rules)


@dataclass
class PairArguments:
    """A drafter and its target."""

    model_name_or_path: str = field(metadata={"help": "Drafter: path or id.", "aliases": ["--model"]})
    teacher_model_name_or_path: str = field(
        metadata={"help": "Target: path or id.", "aliases": ["--teacher", "--teacher_model"]}
    )

    def __post_init__(self) -> None:
        settle_options(self)


@dataclass
class QuantizationArguments:
    """How the target is quantised; names and defaults are those of TRL's `ModelConfig`."""

    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the target to 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the target to 4 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "fp4 or nf4."})
    bnb_4bit_compute_dtype: str = field(default="bfloat16", metadata={"help": "What 4-bit layers compute in."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the constants of 4 bits too."})

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        check_bits(self.load_in_8bit, self.load_in_4bit)

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """
        What these options ask for; `None` for a target as it is.

        Raises:
            `OSError`: bitsandbytes is not here.
        """
        if (self.load_in_8bit or self.load_in_4bit) and importlib.util.find_spec("bitsandbytes") is None:
            raise EnvironmentFault(
                f"`load_in_{'8bit' if self.load_in_8bit else '4bit'}` is true, but bitsandbytes, which quantises, is "
                "not installed. Install it with `pip install bitsandbytes`, or leave the option out."
            )
        from trl import ModelConfig, get_quantization_config

        options = {name: getattr(self, name) for name in ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type")}
        config = get_quantization_config(
            ModelConfig(dtype=self.bnb_4bit_compute_dtype, use_bnb_nested_quant=self.use_bnb_nested_quant, **options)
        )
        if self.load_in_8bit:
            # Above 0 outliers are looked for over the whole batch, so a text depends on those beside it.
            config.llm_int8_threshold = 0.0
        return config


@dataclass
class AdapterArguments:
    """A LoRA adapter on the drafter; names and defaults are those of TRL's `ModelConfig`."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: alpha / rank, or alpha / √rank with rslora."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Names, or all-linear."})
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})

    def __post_init__(self) -> None:
        settle(self, LIMITS)

    def peft_config(self) -> PeftConfig | None:
        """What these options ask for; `None` without `--use_peft`."""
        from trl import ModelConfig, get_peft_config

        return get_peft_config(ModelConfig(lora_task_type=None, **vars(self)))


def check_bits(load_in_8bit: bool, load_in_4bit: bool) -> None:
    """
    Raises:
        `ValueError`: Both.
    """
    if load_in_8bit and load_in_4bit:
        raise InputError("load_in_8bit and load_in_4bit are both true, and a target has one width. Choose one.")


def drafters_by_name(paths: Sequence[str]) -> dict[str, str]:
    """
    Drafters by the name they are shown under: the folder's own, or the whole path where that tells them not apart.

    Raises:
        `ValueError`: One of them twice.
    """
    if len(set(paths)) < len(paths):
        raise InputError(f"--compare {paths[0]} is the drafter of --model itself. Name another one.")
    short = [Path(path).resolve().name for path in paths]
    # Decoding without a drafter goes by the name "plain".
    clear = len(set(short)) == len(paths) and "plain" not in short
    return dict(zip(short if clear else paths, paths, strict=True))


def read_chat_kwargs(given: str | dict[str, Any]) -> dict[str, Any]:
    """
    What `--chat_template_kwargs` gives the chat template.

    Raises:
        `ValueError` or `TypeError`: It is not JSON, or no mapping that a template takes.
    """
    kwargs = read_json("chat_template_kwargs", given) if isinstance(given, str) else given
    return check_value("chat_template_kwargs", kwargs, dict, CHAT_KWARGS)


def suite_paths(words: list[str], names: list[str]) -> dict[str, str]:
    """
    Local copies of suites by name.

    Args:
        words (`list[str]`): Of `--suite_path`, as `name=path`.
        names (`list[str]`): Of the suites.

    Raises:
        `ValueError`: Not such a word, or of another suite.
    """
    paths = dict(word.partition("=")[::2] for word in words)
    for name, copy in paths.items():
        if not copy or name not in names:
            raise InputError(f"--suite_path {name}{'=' if copy else ''}{copy} must be name=path of one of {names}.")
    return paths
