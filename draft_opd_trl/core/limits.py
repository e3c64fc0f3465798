"""What each setting may be, in one table: of training, of decoding and of the command line. Names mean one thing each.

Upper limits stand where nobody can mean what is above: they keep a misplaced zero from costing a day.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checks import (
    Rule,
    Within,
    both,
    http_url,
    jsonable,
    mapping,
    never,
    one_of,
    pairs,
    path,
    plain_mapping,
    text,
    words,
)


DTYPES = ("auto", "float32", "bfloat16", "float16")

_SHARE = Within(0, 1)
_DECAY = Within(above=0, high=1)
_COUNT = Within(1, 10_000_000)
_COUNT_OR_NONE = Within(0, 10_000_000)
_STEPS = Within(above=0, high=1e9, reason="steps, or below 1 a share of all steps", whole=True)
# Below, float32 logits overflow when they are divided by it.
_TEMPERATURE = Within(1e-4, 100, also=(0,), reason="0 is greedy")
_SEED = Within(0, 2**31 - 1)
_WEIGHT = Within(0, 1000)


def dtype(value: Any) -> str | None:
    """A dtype to load in, by name or PyTorch's own."""
    return one_of(*DTYPES)(str(value).removeprefix("torch.") if not isinstance(value, str) else value)


def _file_or_mapping(value: str | dict[str, Any]) -> str | None:
    if not isinstance(value, str):
        return plain_mapping(value)
    return path(value) or (None if Path(value).is_file() else "must be a mapping, or the path of a file that is there")


def _unquoted(value: dict[str, Any]) -> str | None:
    """A template takes the text "false" for true."""
    quoted = [name for name, entry in value.items() if isinstance(entry, str) and entry.lower() in ("true", "false")]
    return f"holds {quoted[0]!r} as text; write true or false without quotes" if quoted else None


def _no_debugging(value: str) -> str | None:
    return None if not value.strip() else never("its hooks take no boolean tensors, which masks are")(value)


def _no_smoothing(value: float) -> str | None:
    return None if value == 0 else never("the losses here take the target's distribution as it is")(value)


def _metric(value: str) -> str | None:
    """One that [`~DraftOPDTrainer.evaluate`] measures; names of data sets may stand before it."""
    ends = ("", "_low", "_high", "_per_prompt", "_from_0")
    known = (*(f"acceptance_length{end}" for end in ends), "blocks_fully_accepted", "tokens_per_second")
    return None if value.endswith(known) else f"must be what is measured, such as {known[0]}"


CHAT_KWARGS = both(
    # What the chat template is given by us.
    mapping(
        taken=("conversation", "tools", "tokenize", "return_dict", "return_tensors", "add_generation_prompt"),
        by="the chat template",
    ),
    jsonable,
    _unquoted,
)

LIMITS: dict[str, Rule] = {
    # Optimisation
    "learning_rate": Within(0, 10),
    "warmup_steps": Within(0, 1e9, reason="steps, or below 1 a share of all steps"),
    "weight_decay": Within(0, 10),
    "adam_beta1": Within(0, below=1),
    "adam_beta2": Within(0, below=1),
    "adam_epsilon": Within(above=0, high=1),
    "optim_args": pairs,
    "max_grad_norm": Within(0, 1e6, reason="0 clips nothing"),
    "label_smoothing_factor": _no_smoothing,
    "neftune_noise_alpha": never("it adds noise to embeddings, and those of a drafter are the target's"),
    "seed": _SEED,
    "data_seed": _SEED,
    # How long, and how much at once
    "num_train_epochs": Within(above=0, high=1e6),
    "max_steps": Within(1, 1e9, also=(-1,), reason="−1 leaves it to num_train_epochs"),
    "per_device_train_batch_size": Within(1, 65536),
    "per_device_eval_batch_size": Within(1, 65536),
    "gradient_accumulation_steps": Within(1, 100_000),
    "steps_per_generation": Within(1, 100_000),
    "eval_accumulation_steps": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    # Logging, evaluation, checkpoints
    "metric_for_best_model": _metric,
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_delay": Within(0, 1e9),
    "save_total_limit": Within(1, 1_000_000, reason="unset, all are kept"),
    "output_dir": path,
    "resume_from_checkpoint": path,
    "deepspeed": _file_or_mapping,
    "fsdp_config": _file_or_mapping,
    "accelerator_config": _file_or_mapping,
    # Loading data, processes
    "dataloader_num_workers": Within(0, 128),
    "dataloader_prefetch_factor": Within(1, 1024),
    "dataloader_multiprocessing_context": one_of("fork", "spawn", "forkserver"),
    "ddp_bucket_cap_mb": Within(1, 1_000_000),
    "ddp_timeout": Within(1, 1_000_000_000),
    "ddp_backend": one_of("nccl", "mpi", "xccl", "hccl", "cncl", "mccl", "gloo"),
    "local_rank": Within(-1, 65536),
    "debug": _no_debugging,
    "fsdp": words(),
    "log_level": one_of("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": one_of("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "train_sampling_strategy": one_of("random", "sequential", "group_by_length"),
    "include_num_input_tokens_seen": one_of("all", "non_padding", "no"),
    "torch_compile_mode": one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    # Models
    "model_init_kwargs": mapping(known=("dtype", "revision", "token"), by="load_drafter", dtype=dtype, revision=text),
    "teacher_model_init_kwargs": mapping(
        taken=("output_loading_info", "pretrained_model_name_or_path"),
        by="the target",
        dtype=dtype,
        revision=text,
    ),
    "chat_template_kwargs": CHAT_KWARGS,
    # Which texts, and who writes them
    "lmbda": Within(0, 1, reason="the on-policy share"),
    "lmbda_end": Within(0, 1, reason="the on-policy share"),
    "server_url": http_url,
    "server_timeout": Within(above=0, high=1_000_000),
    "server_concurrency": Within(1, 4096),
    "server_max_retries": Within(0, 1000),
    "server_reload_steps": _COUNT,
    "server_reload_command": text,
    "text_cache_dir": path,
    "state_store_gib": Within(0, 1_000_000, reason="0 keeps none"),
    "state_store_dir": path,
    "state_store_dtype": one_of(*DTYPES[1:]),
    "regenerate_every": Within(1, 1_000_000),
    "num_texts_to_check": _COUNT_OR_NONE,
    "temperature": _TEMPERATURE,
    "top_k": Within(0, 10_000_000, reason="0 keeps all tokens"),
    "top_p": Within(above=0, high=1),
    "max_prompt_length": _COUNT,
    "max_completion_length": Within(2, 10_000_000, reason="a text of one token holds no block"),
    "max_new_tokens": _COUNT,
    "rollout_batch_size": Within(1, 65536),
    "batch_size": Within(1, 65536),
    "serve_batch_sizes": Within(1, 65536),
    "pad_token_id": Within(0, 2**31 - 1),
    "stop_token_ids": Within(0, 2**31 - 1),
    # What teaches, and how much
    "teacher_temperature": _TEMPERATURE,
    "accepted_weight": _WEIGHT,
    "rejected_weight": _WEIGHT,
    "rejected_decay": _SHARE,
    "accepted_decay": _DECAY,
    "sft_decay": _DECAY,
    "dpace_alpha": _DECAY,
    "beta": _SHARE,
    "loss_max_clamp": Within(above=0, high=1_000_000),
    "max_clamp": Within(above=0, high=1_000_000),
    "log_prob_min_clamp": Within(-1_000_000, below=0),
    "num_anchors": Within(1, 1_000_000),
    "num_chains": Within(1, 10_000),
    "replay_buffer_size": _COUNT_OR_NONE,
    "replay_ratio": Within(0, 100),
    "loss_chunk_size": _COUNT,
    "num_completions_to_print": Within(1, 10_000),
    # The command line
    "model_name_or_path": path,
    "teacher_model_name_or_path": path,
    "compare": path,
    "from_drafter": path,
    "prompts": path,
    "path": path,
    "target": path,
    "dataset_name": path,
    "suite": path,
    "suite_path": path,
    "output_file": path,
    "num_eval_prompts": Within(0, 10_000_000, reason="0 holds none out"),
    "by": one_of("speculation", "replay", "server"),
    "served_model": path,
    "sft_steps": Within(0, 1_000_000_000, reason="0 leaves the stage out"),
    "sft_epochs": Within(0, 1e6, reason="0 leaves the stage out"),
    "sft_learning_rate": Within(0, 10),
    "num_prompts": _COUNT,
    "logs": path,
    "held_out": Within(0, 10_000_000, reason="0 keeps none aside"),
    "dtype": dtype,
    "device_memory": Within(above=0, high=1_000_000),
    "acceptance_length": Within(1, 10_000),
    "bnb_4bit_quant_type": one_of("fp4", "nf4"),
    "bnb_4bit_compute_dtype": dtype,
    "lora_r": Within(1, 65536),
    "lora_alpha": Within(1, 1_000_000),
    "lora_dropout": Within(0, below=1),
}
