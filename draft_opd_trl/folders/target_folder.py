"""A target's folder: its config, its weights and its tokenizer, or what is wrong with them in words.

An adapter's folder (PEFT) is one too: its base, with the adapter merged into the weights as they are read.

Whatever transformers raises while it reads them is about these files, and is said so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..core.errors import EnvironmentFault, InputError, NotFoundError, UserError
from ..core.target_shape import text_config
from ..drafters import DRAFTERS
from .adapters import adapter_base, is_adapter, merge, read_adapter
from .reach import why_not_on_hub


# What of a target's loading options says which files are meant.
HUB = ("revision", "token", "trust_remote_code")


def read_target_config(name: str, revision: str | None = None, **hub: Any) -> PreTrainedConfig:
    """
    The config of a target, without its weights.

    Args:
        name (`str`): Path or id.
        revision (`str`, *optional*), hub: As for `from_pretrained`.

    Raises:
        `FileNotFoundError`: Neither a model's folder nor reachable on the Hub.
        `ValueError`: It is a drafter's, or no model that transformers knows.
    """
    folder = Path(name)
    if is_adapter(folder):
        return read_target_config(adapter_base(folder))
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise NotFoundError(
                f"The target {name} holds no config.json, so it is no model's folder. Give one that is."
            )
    elif not isinstance(_kept(name, revision), str):
        why = why_not_on_hub(name, "model", revision, hub.get("token"))
        if why is not None:
            raise _not_found(name, why)
    try:
        written, _ = PreTrainedConfig.get_config_dict(name, revision=revision, **hub)
        # What is a plain model of transformers can be either.
        kinds = (kind for kind, drafter in DRAFTERS.items() if drafter.code_travels and drafter.recognises(written))
        kind = next(kinds, None)
        if kind is not None:
            raise InputError(
                f"{name} is given as the target, but holds a drafter of kind {kind}. Drafter and target look swapped: "
                "the drafter goes to `model` (--model), the target to `teacher_model` (--teacher)."
            )
        return AutoConfig.from_pretrained(name, revision=revision, **hub)
    except UserError:
        raise
    except OSError as error:
        if not folder.exists():
            is_id = not isinstance(error.__cause__, HFValidationError)
            raise _not_found(name, told(error) if is_id else "it is no id") from error
        file = folder / "config.json"
        raise InputError(f"The target's config {file} cannot be read ({told(error)}). Mend it.") from error
    except Exception as error:  # whatever stands in the file
        raise InputError(
            f"The config.json of the target {name} is of no model that can be made here ({told(error)}). Give another "
            "target."
        ) from error


def target_class(config: PreTrainedConfig) -> Any:
    """
    What makes a target of this config: of a multimodal one the text model alone, where transformers has a class of it;
    else the class that its checkpoint names, which may be the whole with the text model inside; else the auto class
    that knows the config.

    Args:
        config ([`~transformers.PreTrainedConfig`]): As it was read.
    """
    text = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text is not None and text.config_class is not type(config):
        return AutoModelForCausalLM
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        writes = isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate()
        if writes and not config.is_encoder_decoder:
            return named
    if "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForImageTextToText
    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForMultimodalLM if whole else AutoModelForCausalLM


def _kept(name: str, revision: str | None) -> object:
    """The config's path in the Hub's cache, if it is there."""
    try:
        return try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None


def _not_found(name: str, why: str) -> NotFoundError:
    return NotFoundError(
        f"The target {name!r} is no folder here and could not be fetched from the Hub ({why}). Give the path of a "
        "model's folder, or an id you can reach."
    )


def told(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _broken_weights(name: str) -> Path | None:
    """The first file of weights of a local folder that cannot be opened."""
    for file in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception:
            return file
    return None


def read_target(name: str, load: Callable[..., Any], **options: Any) -> PreTrainedModel:
    """
    A target whose every weight came from its files.

    Args:
        name (`str`): Path or id, whose config has been read.
        load (`Callable`): `from_pretrained`, or what calls it.
    """
    if is_adapter(Path(name)):
        return _read_adapted(Path(name), load, options)
    try:
        model, found = load(name, output_loading_info=True, **options)
    except SafetensorError as error:
        raise InputError(
            f"The target's weights {_broken_weights(name) or name} are damaged or cut off ({told(error)}). Copy or "
            "download them again."
        ) from error
    except ImportError as error:
        raise EnvironmentFault(
            f"The target {name} needs a package that is not here ({told(error)}). Install it."
        ) from error
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # The last two may also be a fault of the code, or of memory.
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(
            f"The target {name} could not be loaded ({told(error)}). Check its folder, and what is passed to "
            "`from_pretrained` (`teacher_model_init_kwargs`)."
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"The target {name} lacks {len(missing)} of its weights, such as {missing[0]}, which would be random. "
            "Copy or download it again."
        )
    return model


def _read_adapted(folder: Path, load: Callable[..., Any], options: dict[str, Any]) -> PreTrainedModel:
    """The base of an adapter, with the adapter in its weights, under the name of the adapter's folder."""
    adapter = read_adapter(folder)
    model = read_target(adapter.base, load, **options)
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            f"The adapter in {folder} would be merged into quantised weights, which rounds it away. Load the target "
            "without quantisation; or merge, save, and quantise what was saved."
        )
    model = merge(model, adapter)
    model.config._name_or_path = str(folder)
    return model


def read_tokenizer(name: str, config: PreTrainedConfig | None = None, **hub: Any) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a target.

    Args:
        name (`str`): Path or id.
        config ([`~transformers.PreTrainedConfig`], *optional*): The target's, to see that they fit.
        hub: As for `from_pretrained`.

    Raises:
        `ValueError`: There is none, or it has tokens that the target does not have.
    """
    if is_adapter(Path(name)) and not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter_base(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except Exception as error:  # whatever stands in its files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(
            f"The tokenizer of the target {name} could not be read ({told(error)}). Put its files beside the weights."
        ) from error
    if tokenizer.vocab_size <= 1:
        # What transformers makes up where there are no files.
        raise InputError(f"The target {name} comes without a tokenizer. Put its files beside the weights.")
    size = None if config is None else text_config(config).vocab_size
    if size is not None and tokenizer.vocab_size > size:
        raise InputError(
            f"The tokenizer of {name} has {tokenizer.vocab_size} tokens, but the target's vocabulary is {size}, so it "
            "is another model's. Put the right one there."
        )
    return tokenizer
