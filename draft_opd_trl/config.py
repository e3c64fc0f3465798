"""`DraftOPDConfig`: every knob, checked for contradictions before anything expensive. Holds no behaviour."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from ._trl_compat import _BaseConfig
from .block_choice import ANCHORS
from .checks import check_settings, one_of
from .errors import InputError
from .limits import LIMITS
from .losses import HARD_LOSSES, LOSSES
from .probing import (
    SCHEDULES_BY_METRIC,
    TRACKERS,
    as_input_errors,
    check_backend,
    check_trackers,
    try_optimizer,
    try_schedule,
)
from .redaction import drop_secrets, redact_url, shown, without_secrets


ROLLOUT_SOURCES = ("speculation", "generate", "server", "dataset")
# What fields take beyond their annotations, given or as transformers leaves them.
_ALSO = {
    "debug": list[DebugOption] | str | None,
    "lr_scheduler_type": SchedulerType | str,
    "resume_from_checkpoint": bool | str | None,
    "fsdp": bool | str | list[str] | None,
    "accelerator_config": AcceleratorConfig | dict | str | None,
}
# Mappings that may be given as a file, too.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
# What a recipe sets. "paper": Draft-OPD (arXiv 2605.29343), section 4 and its appendix, on DFlash.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "optim": "adamw_torch",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "num_train_epochs": 7,
        "per_device_train_batch_size": 21,
        "gradient_accumulation_steps": 10,
        "max_prompt_length": 512,
        "max_completion_length": 4096,
        "temperature": 0.0,
        "teacher_temperature": 1.0,
        "lmbda": 1.0,
        "anchors": "exposed",
        "accepted_loss": "bernoulli_forward_kl",
        "rejected_loss": "k3",
        "accepted_weight": 1.0,
        "rejected_weight": 1.0,
        "accepted_decay": 1.0,
        "rejected_decay": 0.8,
        "loss_max_clamp": 10.0,
        "log_prob_min_clamp": -10.0,
    },
}


@dataclass
class DraftOPDConfig(_BaseConfig):
    r"""
    Configuration of [`DraftOPDTrainer`].

    Only what differs from [`~transformers.TrainingArguments`] is listed. Words are GKD's where GKD has them.

    Parameters:
        recipe (`str`, *optional*, defaults to `"default"`):
            `default` is ours; `paper` sets what Draft-OPD was published with. A field given a value other than its
            default keeps it.
        model_init_kwargs (`dict`, *optional*):
            Passed to [`load_drafter`] when `model` is a path or id (`dtype`, `revision`, `token`).
        teacher_model_init_kwargs (`dict`, *optional*):
            Passed to the target's `from_pretrained`. `dtype` defaults to `"auto"`: the target keeps its own.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Probability that a text is replayed on-policy: 1 is Draft-OPD, 0 is SFT on random anchors of the same text.
        lmbda_end (`float`, *optional*):
            What `lmbda` goes to, linearly over the steps of the run. Constant by default.
        anchors (`str`, *optional*, defaults to `"exposed"`):
            Where on-policy blocks start: at the anchors that verification of the current drafter has (`exposed`), or
            at `random` ones, to tell the effect of the anchors from that of the drafter's own proposals.
        rollout_source (`str`, *optional*, defaults to `"speculation"`):
            Who writes the text: `speculation` (target sped up by the drafter in training), `generate` (target alone),
            `server` (an OpenAI-compatible completions endpoint that serves the target) or `dataset` (completions the
            target already wrote).
        server_url (`str`, *optional*):
            Where the server listens, such as `http://localhost:8000`. vLLM and SGLang are told and asked token ids;
            `transformers serve` is told text, which is tokenised again and held against the target.
        server_model, server_token (`str`, *optional*):
            Model to ask for, where it serves several; bearer token.
        server_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds an answer may take.
        server_concurrency, server_max_retries (`int`, *optional*, default to `64`, `5`):
            Requests under way at once, and repetitions of a failed one with exponential back-off; a process.
        text_cache_dir (`str`, *optional*):
            Where written texts are kept, for later epochs and other runs. Default: `_text_cache` in `output_dir`.
        regenerate_every (`int`, *optional*, defaults to `1`):
            Epochs that a drawn text serves (temperature > 0). At temperature 0 a text is written once.
        num_texts_to_check (`int`, *optional*, defaults to `16`):
            Texts of the data set that the target reads before training, to warn if they are not its own
            (`rollout_source="dataset"`).
        steps_per_generation (`int`, *optional*):
            Micro-steps a set of texts serves; a multiple of `gradient_accumulation_steps`, its default.
        temperature, top_k, top_p (`float`, `int`, `float`, *optional*, default to `0.0`, `0`, `1.0`):
            The law of the target's text, which is also the law verification will use.
        sample_proposals (`bool`, *optional*, defaults to `False`):
            Train and evaluate with proposals drawn from the drafter instead of its argmax (temperature > 0).
        max_prompt_length (`int`, *optional*, defaults to `512`):
            A longer prompt is an error unless `truncate_prompts`.
        truncate_prompts (`bool`, *optional*, defaults to `False`):
            Keep the last `max_prompt_length` tokens of longer prompts.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Longest completion, in tokens, stop token included.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template, such as `{"enable_thinking": false}`.
        rollout_batch_size (`int`, *optional*, defaults to `32`):
            Rows decoded side by side in rollouts and evaluation.
        accepted_loss (`str`, *optional*):
            Divergence of the accepted stream. Default: `ce` at teacher temperature 0, else `forward_kl`.
        rejected_loss (`str`, *optional*):
            Divergence of the rejected stream. Default: `ce` at teacher temperature 0, else `reverse_kl`.
        accepted_weight, rejected_weight (`float`, *optional*, default to `1.0`, `0.0`):
            λ of each stream of on-policy blocks; SFT blocks weigh 1. The paper takes 1 for both.
        rejected_decay (`float`, *optional*, defaults to `0.8`):
            γ of the rejected stream; 0 leaves its first slot alone.
        accepted_decay (`float`, *optional*, defaults to `1.0`):
            Weight of slot k of the accepted stream is `accepted_decay ** (k − 1)`.
        sft_decay (`float`, *optional*):
            The same for SFT blocks; the architecture's own recipe by default.
        whole_blocks (`bool`, *optional*, defaults to `False`):
            Let the accepted stream teach the text at every slot of a block, also behind the first rejection.
        beta (`float`, *optional*, defaults to `0.5`):
            Interpolation of `jsd`.
        teacher_temperature (`float`, *optional*):
            Temperature of the target's distribution in the losses; the rollout's by default, because the drafter is
            verified against that. 0 means hard targets.
        loss_max_clamp, log_prob_min_clamp (`float`, *optional*):
            Ceiling of a slot's loss; floor of log-probabilities in the sampled estimators (the paper: 10 and −10).
        num_anchors (`int`, *optional*, defaults to `512`):
            Most blocks trained on, a text: those with an error first. Also the number of random anchors of SFT.
        num_chains (`int`, *optional*, defaults to `8`):
            Anchors of each text drafted at once in replay; changes speed only.
        replay_buffer_size (`int`, *optional*, defaults to `0`):
            Texts whose error positions are remembered.
        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Remembered texts drawn for each new one, drafted afresh.
        replay_by_loss (`bool`, *optional*, defaults to `False`):
            Draw remembered texts and anchors by their last loss instead of evenly.
        loss_chunk_size (`int`, *optional*, defaults to `256`):
            Slots projected to the vocabulary at once; bounds memory.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Turn dropout off in the drafter.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Shuffle prompts.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print a few texts at each log as the blocks that verification sees, and send them to the trackers of
            `report_to` that have tables.
        num_completions_to_print (`int`, *optional*, defaults to `2`):
            How many.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "teacher_model_init_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate (the paper's)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule (the paper's)."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or a share of all steps below 1."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Drafters are shallow: off."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are checked by the trainer."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})

    recipe: str = field(default="default", metadata={"help": "Set of defaults.", "choices": list(RECIPES)})
    model_init_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "For the drafter."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "For the target."})
    lmbda: float = field(default=1.0, metadata={"help": "On-policy share: 1 is Draft-OPD, 0 is SFT."})
    lmbda_end: float | None = field(default=None, metadata={"help": "What lmbda goes to over the run."})
    anchors: str = field(
        default="exposed", metadata={"help": "Where on-policy blocks start.", "choices": list(ANCHORS)}
    )
    rollout_source: str = field(
        default="speculation", metadata={"help": "Who writes the text.", "choices": list(ROLLOUT_SOURCES)}
    )
    server_url: str | None = field(default=None, metadata={"help": "Completions server, as http://localhost:8000."})
    server_model: str | None = field(default=None, metadata={"help": "Model to ask the server for."})
    server_token: str | None = field(default=None, metadata={"help": "Bearer token for the server."})
    server_timeout: float = field(default=600.0, metadata={"help": "Seconds an answer of the server may take."})
    server_concurrency: int = field(default=64, metadata={"help": "Requests under way at once, a process."})
    server_max_retries: int = field(default=5, metadata={"help": "Repetitions of a failed request."})
    text_cache_dir: str | None = field(default=None, metadata={"help": "Where written texts are kept."})
    regenerate_every: int = field(default=1, metadata={"help": "Epochs that a drawn text serves."})
    num_texts_to_check: int = field(default=16, metadata={"help": "Texts of the data set the target reads first."})
    steps_per_generation: int | None = field(default=None, metadata={"help": "Micro-steps a set of texts serves."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of the target; 0 is greedy."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the target; 0 keeps all."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the target."})
    sample_proposals: bool = field(default=False, metadata={"help": "Draw proposals instead of taking the argmax."})
    max_prompt_length: int | None = field(default=512, metadata={"help": "Longest prompt, in tokens."})
    truncate_prompts: bool = field(default=False, metadata={"help": "Cut longer prompts from the left."})
    max_completion_length: int = field(default=1024, metadata={"help": "Longest completion, in tokens."})
    chat_template_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "For the template."})
    rollout_batch_size: int = field(default=32, metadata={"help": "Rows decoded side by side."})
    accepted_loss: str | None = field(default=None, metadata={"help": f"One of {', '.join(LOSSES)}."})
    rejected_loss: str | None = field(default=None, metadata={"help": f"One of {', '.join(LOSSES)}."})
    accepted_weight: float = field(default=1.0, metadata={"help": "Weight of the accepted stream."})
    rejected_weight: float = field(default=0.0, metadata={"help": "Weight of the rejected stream."})
    rejected_decay: float = field(default=0.8, metadata={"help": "Decay along the rejected stream."})
    accepted_decay: float = field(default=1.0, metadata={"help": "Decay along the accepted stream."})
    sft_decay: float | None = field(default=None, metadata={"help": "Decay along SFT blocks."})
    whole_blocks: bool = field(default=False, metadata={"help": "Teach the text behind the first rejection too."})
    beta: float = field(default=0.5, metadata={"help": "Interpolation of jsd: 0 forward, 1 reverse KL."})
    teacher_temperature: float | None = field(default=None, metadata={"help": "The rollout's by default."})
    loss_max_clamp: float | None = field(default=None, metadata={"help": "Ceiling of a slot's loss."})
    log_prob_min_clamp: float | None = field(default=None, metadata={"help": "Floor of sampled log-probabilities."})
    num_anchors: int = field(default=512, metadata={"help": "Most blocks trained on, a text."})
    num_chains: int = field(default=8, metadata={"help": "Anchors a text drafted at once; speed only."})
    replay_buffer_size: int = field(default=0, metadata={"help": "Texts whose error positions are remembered."})
    replay_ratio: float = field(default=0.0, metadata={"help": "Remembered texts drawn for each new one."})
    replay_by_loss: bool = field(default=False, metadata={"help": "Draw remembered positions by their last loss."})
    loss_chunk_size: int = field(default=256, metadata={"help": "Slots projected to the vocabulary at once."})
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off in the drafter."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle prompts."})
    log_completions: bool = field(default=False, metadata={"help": "Print a few texts at each log, as blocks."})
    num_completions_to_print: int = field(default=2, metadata={"help": "How many texts to print."})

    def __post_init__(self) -> None:
        """
        Raises:
            `ValueError` or `TypeError`: A setting is of the wrong type, outside its range, or contradicts another.
        """
        self._read_json()
        self.report_to = "none" if self.report_to is None else self.report_to
        check_settings(
            self,
            LIMITS,
            hints=_ALSO,
            recipe=one_of(*RECIPES),
            anchors=one_of(*ANCHORS),
            rollout_source=one_of(*ROLLOUT_SOURCES),
            accepted_loss=one_of(*LOSSES),
            rejected_loss=one_of(*LOSSES),
            report_to=one_of("none", "all", *TRACKERS),
        )
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)
        self._choose_device()
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.lr_scheduler_type in SCHEDULES_BY_METRIC
        ):
            # transformers would look for a loss, which is not measured.
            self.metric_for_best_model = "acceptance_length"
        as_input_errors(self, super().__post_init__)
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.teacher_temperature is None:
            self.teacher_temperature = self.temperature
        hard = self.teacher_temperature == 0
        self.accepted_loss = self.accepted_loss or ("ce" if hard else "forward_kl")
        self.rejected_loss = self.rejected_loss or ("ce" if hard else "reverse_kl")
        self._check_contradictions()
        check_trackers(self)
        check_backend(self)
        try_schedule(self)
        try_optimizer(self)

    def _read_json(self) -> None:
        """Mappings that came as text, as the command line gives them."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str) or (name in _FILES and not value.startswith("{")):
                continue
            try:
                setattr(self, name, json.loads(value))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"`{name}` is {shown(name, value)}, which is not JSON ({error}). Give a mapping such as "
                    '\'{"name": "value"}\'.'
                ) from None

    def _choose_device(self) -> None:
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            for name in ("bf16", "fp16"):
                if getattr(self, name):
                    raise InputError(
                        f"{name}=True, but there is no GPU, and drafters train on CPU in float32 here. Leave `{name}` "
                        "unset or set it to False."
                    )
            self.bf16, self.use_cpu = False, True
        elif self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def _check_contradictions(self) -> None:
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise InputError(
                f"steps_per_generation={self.steps_per_generation} is not a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, so a text would be split between optimizer steps. Make it one."
            )
        if self.accepted_weight == 0 and self.rejected_weight == 0:
            raise InputError(
                "accepted_weight and rejected_weight are both 0, so nothing would be learnt. Set one above 0."
            )
        streams = [("accepted_loss", self.accepted_weight), ("rejected_loss", self.rejected_weight)]
        for name, weight in streams:
            if weight > 0 and self.teacher_temperature == 0 and getattr(self, name) not in HARD_LOSSES:
                raise InputError(
                    f"{name}={getattr(self, name)!r} compares distributions, but teacher_temperature=0 makes the "
                    f"target a point mass. Use one of {', '.join(HARD_LOSSES)}, or set teacher_temperature above 0."
                )
        if self.rejected_weight > 0 and self.rejected_loss == "accepted_length":
            raise InputError(
                "rejected_loss='accepted_length' counts slots from the block's first, but the rejected stream begins "
                "later. Use it for the accepted stream only."
            )
        if (self.rollout_source == "server") != (self.server_url is not None):
            raise InputError(
                f"rollout_source={self.rollout_source!r} and server_url="
                f"{self.server_url and redact_url(self.server_url)!r} do not go together: a server is asked "
                "if and only if both name it. Set both, or neither."
            )
        if self.replay_ratio > 0 and self.replay_buffer_size == 0:
            raise InputError(
                f"replay_ratio={self.replay_ratio} draws from a buffer of size 0. Set replay_buffer_size above 0."
            )
        if self.replay_by_loss and self.replay_ratio == 0:
            raise InputError("replay_by_loss=True, but replay_ratio=0 draws nothing. Set replay_ratio above 0.")
        if self.lmbda == 0 and not self.lmbda_end and self.replay_ratio > 0:
            raise InputError("lmbda=0 (SFT) exposes no error positions for replay_ratio > 0 to draw. Set one of them.")
        if self.sample_proposals and self.temperature == 0:
            raise InputError("sample_proposals=True needs temperature > 0; at 0 proposals are the drafter's argmax.")
        if self.use_liger_kernel:
            raise InputError(
                "use_liger_kernel=True patches the models that Liger knows, and a drafter is none. Leave it off."
            )
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise InputError(
                    f"`accelerator_config` sets {name}, but the trainer lays its batches out itself. Leave it out."
                )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise InputError(
                "dataloader_persistent_workers=True keeps workers alive, but dataloader_num_workers=0 starts none. "
                "Set dataloader_num_workers above 0, or leave persistent workers off."
            )

    # -- what may leave the process: everything but secrets -----------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values, without tokens and passwords, wherever they stand."""
        return without_secrets({entry.name: getattr(self, entry.name) for entry in fields(self)})

    def __str__(self) -> str:
        settings = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        """For pickles, which the Trainer leaves in every checkpoint. A copy (`copy.copy`) keeps its tokens."""
        state = dict(self.__dict__)
        for name in ("hub_token", "server_token"):
            state[name] = None
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            state[name] = drop_secrets(state[name])
        if self.server_url is not None:
            state["server_url"] = redact_url(self.server_url)
        return state

    def __copy__(self) -> DraftOPDConfig:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> DraftOPDConfig:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
