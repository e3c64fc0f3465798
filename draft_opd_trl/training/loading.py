"""What a run is made of, loaded and checked before anything expensive: target, tokenizer, sizes, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._trl_compat import create_model_from_path
from ..core.checks import check_value
from ..core.errors import InputError, InputTypeError
from ..core.files import check_writable
from ..core.limits import LIMITS
from ..core.sampling_params import SamplingParams
from ..core.target import Target
from ..drafters.base import Drafter
from ..folders.adapters import AdaptedDrafter
from ..folders.checkpoints import drafter_class_of, drafter_folder, load_drafter, read_config
from ..folders.hub import check_hub_access
from ..folders.serving import serving_faults
from ..folders.target_folder import HUB, read_target, read_target_config, read_tokenizer, target_class, told
from ..texts.authorship import describe_misfit, text_fit
from ..texts.prompts import tokenize_dataset
from ..texts.sources import RolloutSource
from .config import DraftOPDConfig


logger = get_logger(__name__)


def check_pair(drafters: Sequence[str], teacher_model: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a target, which is there, as drafters are: what is small first, as wrong names and rows must show
    before gigabytes are read.

    Args:
        drafters (`Sequence[str]`): Paths or ids.
        teacher_model (`str`): Path or id of the target.

    Raises:
        `FileNotFoundError`: There is no target, or no drafter, of that name.
        `ValueError`: It is none.
    """
    tokenizer = read_tokenizer(teacher_model, read_target_config(teacher_model))
    for name in drafters:
        check_drafter(name)
    return tokenizer


def load_pair(
    drafters: Sequence[str], teacher_model: str, dtype: str = "float32", quantization_config: Any = None
) -> tuple[Target, list[Drafter], PreTrainedTokenizerBase]:
    """
    A target, drafters bound to it, and its tokenizer, ready to decode; on the GPU if there is one.

    Args:
        drafters (`Sequence[str]`): Paths or ids.
        teacher_model (`str`): Path or id of the target.
        dtype (`str`, *optional*, defaults to `"float32"`): Of all of them, or `"auto"` for the target's own.
        quantization_config (*optional*): Of the target.
    """
    dtype = check_value("dtype", dtype, str, LIMITS["dtype"])
    tokenizer, config = check_pair(drafters, teacher_model), read_target_config(teacher_model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": dtype, "device_map": device, "quantization_config": quantization_config}
    target = Target(read_target(teacher_model, target_class(config).from_pretrained, **options))
    bound = [load_drafter(name, dtype=target.dtype).to(device).bind(target) for name in drafters]
    return target, bound, tokenizer


def check_drafter(name: str, revision: str | None = None, token: str | None = None) -> None:
    """
    Raises:
        `FileNotFoundError`: There is no drafter of that name.
        `ValueError`: It is no drafter.
    """
    folder = drafter_folder(name, revision, token)
    if not (folder / "adapter_config.json").is_file():
        drafter_class_of(read_config(folder), folder)


def check_run(args: DraftOPDConfig, has_eval_dataset: bool) -> None:
    """
    What a run must have around it, before anything is read.

    Raises:
        `ValueError`: It is started as what it cannot be, or shall evaluate on nothing.
        `OSError`: The Hub or the output folder refuses.
    """
    if args.push_to_hub:
        check_hub_access(args.hub_token)
    check_writable(args.output_dir)
    if args.fsdp and args.world_size == 1:
        raise InputError("fsdp shards over several processes, and there is one. Start with `accelerate launch`.")
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel cannot drive a drafter bound to "
            "one target. Launch with `accelerate launch`, or make one GPU visible."
        )
    if not has_eval_dataset and (args.eval_strategy != "no" or args.eval_on_start):
        raise InputError(
            f"eval_strategy is {args.eval_strategy.value!r} and eval_on_start is {args.eval_on_start}, but there "
            "is no `eval_dataset` (--num_eval_prompts 0). Give one, or set eval_strategy to 'no'."
        )


def load_tokenizer(
    teacher_model: str | PreTrainedModel, args: DraftOPDConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """
    The target's tokenizer, unless one is given.

    Raises:
        `ValueError`: The target is an instance that does not say where it came from.
    """
    if tokenizer is not None:
        return tokenizer
    hub = {key: value for key, value in (args.teacher_model_init_kwargs or {}).items() if key in HUB}
    if isinstance(teacher_model, str):
        return read_tokenizer(teacher_model, read_target_config(teacher_model, **hub), **hub)
    if not teacher_model.config._name_or_path:
        raise InputError("The target was given as an instance without a path: pass its tokenizer too.")
    return read_tokenizer(teacher_model.config._name_or_path, teacher_model.config, **hub)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    args: DraftOPDConfig,
    dataset: Dataset,
    name: str,
    needs_completions: bool = False,
) -> Dataset:
    """[`tokenize_dataset`] as the settings say."""
    return tokenize_dataset(
        dataset,
        tokenizer,
        args.max_prompt_length,
        args.chat_template_kwargs,
        needs_completions,
        truncate_prompts=args.truncate_prompts,
        name=name,
    )


def load_target(
    teacher_model: str | PreTrainedModel, args: DraftOPDConfig, quantization_config: Any
) -> PreTrainedModel:
    """
    The target, in its own dtype unless `teacher_model_init_kwargs` says otherwise.

    Raises:
        `ValueError`: Loading options beside an instance.
    """
    init_kwargs = dict(args.teacher_model_init_kwargs or {})
    if not isinstance(teacher_model, str):
        if init_kwargs or quantization_config is not None:
            raise InputError(
                "teacher_model_init_kwargs and quantization_config only apply when teacher_model is a path or id, but "
                "an instance was given. Drop them, or give the path."
            )
        return teacher_model
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    init_kwargs.setdefault("dtype", "auto")
    if args.world_size > 1:
        init_kwargs["device_map"] = None
    config = read_target_config(teacher_model, **{key: init_kwargs[key] for key in HUB if key in init_kwargs})
    return read_target(teacher_model, create_model_from_path, architecture=target_class(config), **init_kwargs)


def warn_about_quantization(target: Target) -> None:
    """Say what τ of a quantised target is worth, and where its text depends on the batch."""
    if not target.quantized:
        return
    config = target.model.hf_quantizer.quantization_config
    logger.warning(
        f"The target is quantised ({config.quant_method}), and so is what the drafter is trained for and judged "
        "against here. Judge it against the target as it will be served: `draft-opd evaluate` takes the same options."
    )
    if getattr(config, "load_in_8bit", False) and config.llm_int8_threshold > 0:
        logger.warning(
            f"llm_int8_threshold={config.llm_int8_threshold} looks for outliers over the whole batch, so a text "
            "depends on those beside it, and speculation changes texts. Set it to 0."
        )


def warn_about_serving(drafter: Drafter, target: Target) -> None:
    """Say, once and before any step, which engines do not serve such a drafter with such a target."""
    faults = serving_faults(drafter, target.config.model_type)
    refusing = [told for told, _, served in faults if served is False]
    if refusing:
        logger.warning_once(f"Not every engine will serve this drafter: {'. '.join(refusing)}.")


def choose_pad_token(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """The padding token; texts carry lengths, so a stop token may serve as one. The target reads it, so it has it."""
    vocab_size = teacher.get_input_embeddings().num_embeddings
    for candidate in (tokenizer.pad_token_id, getattr(teacher.generation_config, "pad_token_id", None)):
        if candidate is not None and 0 <= candidate < vocab_size:
            return candidate
    return stops[0]


def generation_batch_size(args: DraftOPDConfig) -> int:
    """Prompts that one round of text writing takes, over all ranks."""
    return args.per_device_train_batch_size * args.world_size * args.steps_per_generation


def check_dataset_size(dataset: Dataset, args: DraftOPDConfig) -> None:
    """
    Raises:
        `ValueError`: Fewer rows than one generation batch, which would train no step and report success.
    """
    needed = generation_batch_size(args)
    if len(dataset) < needed:
        raise InputError(
            f"`train_dataset` has {len(dataset)} rows, fewer than one generation batch of {needed} "
            f"(per_device_train_batch_size {args.per_device_train_batch_size} × {args.world_size} processes × "
            f"steps_per_generation {args.steps_per_generation}), so it would train 0 steps. Add prompts or lower them."
        )


def check_texts(dataset: Dataset, count: int, source: RolloutSource, target: Target, sampling: SamplingParams) -> None:
    """
    Warn, with numbers, if texts of the data set are not what the target writes.

    Args:
        dataset ([`~datasets.Dataset`]): Tokenised, with completions.
        count (`int`): Texts to read, spread over the data set; 0 reads none.
        source ([`RolloutSource`]): Cuts them as training will.
        target ([`Target`]): Reads them.
        sampling ([`SamplingParams`]): The law they are said to follow.
    """
    count = min(count, len(dataset))
    if count:
        rows = [dataset[index * len(dataset) // count] for index in range(count)]
        misfit = describe_misfit(text_fit(target, source.write(rows), sampling), sampling)
        if misfit is not None:
            logger.warning(misfit)


def add_adapter(drafter: Drafter, peft_config: PeftConfig, revision: str | None = None) -> PeftModel:
    """
    The drafter with an adapter that is trained in its place.

    Args:
        drafter ([`Drafter`]): Its path is what the adapter's folder will name as its base.
        peft_config ([`~peft.PeftConfig`]): Any method that adapts weights.
        revision (`str`, *optional*): Of the drafter on the Hub; goes into the adapter's folder.

    Raises:
        `TypeError`: Not a PEFT config.
        `ValueError`: It names a task type, and PEFT would look for a model of that task; or it trains a prompt, or
            adapts what the drafter keeps as it is.
    """
    if not isinstance(peft_config, PeftConfig):
        raise InputTypeError(f"`peft_config` must be a `peft.PeftConfig`, not {type(peft_config).__name__}.")
    if peft_config.task_type is not None:
        raise InputError(
            f"peft_config.task_type is {peft_config.task_type!r}, but a drafter is no such model. Set it to None."
        )
    if peft_config.is_prompt_learning:
        raise InputError(
            f"{type(peft_config).__name__} trains a prompt, but a drafter reads target states. Use a method that "
            "adapts weights, such as LoraConfig."
        )
    # What the drafter itself does not train, it keeps as it is for a reason, such as engines that lend their own.
    kept = {name.rpartition(".")[0] for name, value in drafter.named_parameters() if not value.requires_grad}
    before = {name: drafter.get_submodule(name) for name in kept}
    try:
        model = AdaptedDrafter.of(drafter, peft_config, revision)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"The drafter takes no adapter of this peft_config ({told(error)}). Correct its target_modules "
            "(--lora_target_modules), or leave them out."
        ) from error
    if adapted := sorted(name for name, module in before.items() if drafter.get_submodule(name) is not module):
        raise InputError(
            f"peft_config adapts {adapted}, which a {drafter.kind} drafter of this config keeps as it is, because "
            "engines take the target's. Leave it out of target_modules and modules_to_save."
        )
    return model
