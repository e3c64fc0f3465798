"""`DraftOPDConfig`: every knob, checked for contradictions before anything expensive. Holds no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .._trl_compat import _BaseConfig
from ..core.checks import check_value, one_of, read_json, settle
from ..core.errors import InputError
from ..core.limits import LIMITS
from ..core.redaction import KeepsSecrets
from ..core.sampling_params import SamplingParams
from .block_choice import ANCHORS, OnPolicySettings
from .contradictions import check_together
from .divergences import LOSSES, LossSettings, StreamLosses
from .optim import MUON, peak_rate
from .probing import (
    SCHEDULES_BY_METRIC,
    TRACKERS,
    as_input_errors,
    check_backend,
    check_trackers,
    try_optimizer,
    try_schedule,
)
from .recipe import OfRecipe, defaults_of, fill, recipe_names
from .streams import StreamSettings


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


def _field(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _of_recipe(help: str) -> Any:
    return _field(help, OfRecipe())


@dataclass(repr=False)  # which would show tokens
class DraftOPDConfig(KeepsSecrets, _BaseConfig):
    r"""
    Configuration of [`DraftOPDTrainer`].

    Only what differs from [`~transformers.TrainingArguments`] is listed. Words are GKD's where GKD has them. A value
    that is given wins over a recipe's, also where it equals a default; `dataclasses.replace` gives every value.

    Parameters:
        recipe (`str`, *optional*, defaults to `"default"`):
            Where what is not given comes from: `default` is ours; `paper` is what Draft-OPD was published with; `sft`,
            `auf`, `dpace`, `lk` and `accepted_length` are controls.

        > Parameters that control the drafter and the target

        model_init_kwargs (`dict`, *optional*):
            Passed to [`load_drafter`] when `model` is a path or id (`dtype`, `revision`, `token`).
        teacher_model_init_kwargs (`dict`, *optional*):
            Passed to the target's `from_pretrained`. `dtype` defaults to `"auto"`: the target keeps its own.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Turn dropout off in the drafter.

        > Parameters that control the prompts

        max_prompt_length (`int`, *optional*, defaults to `512`):
            A longer prompt is an error unless `truncate_prompts`.
        truncate_prompts (`bool`, *optional*, defaults to `False`):
            Keep the last `max_prompt_length` tokens of longer prompts.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template, such as `{"enable_thinking": false}`.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Shuffle prompts.

        > Parameters that control the texts

        rollout_source (`str`, *optional*, defaults to `"speculation"`):
            Who writes the text: `speculation` (target sped up by the drafter in training), `generate` (target alone),
            `server` (an OpenAI-compatible completions endpoint that serves the target) or `dataset` (completions the
            target already wrote).
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Longest completion, in tokens, stop token included.
        temperature, top_k, top_p (`float`, `int`, `float`, *optional*, default to `0.0`, `0`, `1.0`):
            The law of the target's text, which is also the law verification will use.
        sample_proposals (`bool`, *optional*, defaults to `False`):
            Train and evaluate with proposals drawn from the drafter instead of its argmax (temperature > 0).
        rollout_batch_size (`int`, *optional*, defaults to `32`):
            Texts decoded side by side in rollouts and evaluation.
        steps_per_generation (`int`, *optional*):
            Micro-steps a set of texts serves; a multiple of `gradient_accumulation_steps`, its default.
        regenerate_every (`int`, *optional*, defaults to `1`):
            Epochs that a drawn text serves (temperature > 0). At temperature 0 a text is written once.
        text_cache_dir (`str`, *optional*):
            Where written texts are kept, for later epochs and other runs. Default: `_text_cache` in `output_dir`.
        state_store_gib (`float`, *optional*, defaults to `0.0`):
            Keep the target's states of texts it has read, up to so many GiB (a process), instead of reading a text
            anew whenever a step meets it. In memory, or where `state_store_dir` says.
        state_store_dir (`str`, *optional*):
            Keep them on disk, for other stages and runs with the same target and drafter taps too.
        state_store_dtype (`str`, *optional*):
            Round them to this dtype, such as `bfloat16`; the target's own by default.
        num_texts_to_check (`int`, *optional*, defaults to `16`):
            Texts of the data set that the target reads before training, to warn if they are not its own
            (`rollout_source="dataset"`).

        > Parameters that control the server (only used when `rollout_source` is `"server"`)

        server_url (`str`, *optional*):
            Where the server listens, such as `http://localhost:8000`. vLLM and SGLang are told and asked token ids;
            `transformers serve` is told text, which is tokenised again and held against the target.
        server_model, server_token (`str`, *optional*):
            Model to ask for, where it serves several; bearer token.
        server_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds an answer may take.
        server_concurrency, server_max_retries (`int`, *optional*, default to `64`, `5`):
            Requests under way at once, and repetitions of a failed one with exponential back-off; a process.
        server_reload_steps, server_reload_command (`int`, `str`, *optional*):
            Every so many steps the drafter is written to `_served_drafter` in `output_dir`, and the command is run,
            with this folder behind its words. It has the server load the folder, and returns when the server answers.

        > Parameters that control what is replayed

        lmbda (`float`, *optional*, defaults to `1.0`):
            Probability that a text is replayed on-policy: 1 is Draft-OPD, 0 is SFT on random anchors of the same text.
        lmbda_end (`float`, *optional*):
            What `lmbda` goes to, linearly over the steps of the run. Constant by default.
        anchors (`str`, *optional*, defaults to `"exposed"`):
            Where on-policy blocks start: `exposed`, where verification of the current drafter exposed an anchor, or
            `random`, at `num_anchors` places of each text, with the drafter's own proposals (Spec-AUF).
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

        > Parameters that control the losses

        teacher_temperature (`float`, *optional*):
            Temperature of the target's distribution in the losses; the rollout's by default, because the drafter is
            verified against that. 0 means hard targets.
        accepted_loss, rejected_loss (`str`, *optional*):
            Divergence of each stream: `ce`, `forward_kl`, `reverse_kl`, `jsd`, `tv`, `log_acceptance`, `lk`,
            `accepted_length` (the accepted one's alone), `ce_tv`, `bernoulli_forward_kl` or `k3`. Default: `ce` at
            teacher temperature 0, else `forward_kl` and `reverse_kl`.
        accepted_weight, rejected_weight (`float`, *optional*, default to `1.0`, `0.0`):
            λ of each stream of on-policy blocks; SFT blocks weigh 1. The paper takes 1 for both.
        accepted_decay (`float`, *optional*, defaults to `1.0`):
            Weight of slot k of the accepted stream is `accepted_decay ** (k − 1)`.
        rejected_decay (`float`, *optional*, defaults to `0.8`):
            γ of the rejected stream; 0 leaves its first slot alone.
        sft_decay (`float`, *optional*):
            Weight of slot k of SFT blocks is `sft_decay ** (k − 1)`; the architecture's own recipe by default.
        dpace_alpha (`float`, *optional*):
            α of D-PACE, in (0, 1]: slots of the accepted stream and of SFT blocks weigh by how likely the drafter is
            to be right up to them and behind, in place of both decays. Off by default; published with 0.5.
        beta (`float`, *optional*, defaults to `0.5`):
            Interpolation of `jsd`.
        loss_max_clamp, log_prob_min_clamp (`float`, *optional*):
            Ceiling of a slot's loss; floor of log-probabilities in the sampled estimators (the paper: 10 and −10).
        loss_chunk_size (`int`, *optional*, defaults to `256`):
            Slots projected to the vocabulary at once; bounds memory.

        > Parameters that control the logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print a few texts at each log as the blocks that verification sees, and send them to the trackers of
            `report_to` that have tables.
        num_completions_to_print (`int`, *optional*, defaults to `2`):
            How many.
        serve_batch_sizes (`list[int]`, *optional*, defaults to `[]`):
            Batch sizes for which `evaluate()` outside of training also says how many proposals to serve with, from
            rounds that it times; on the card, too.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `bf16`: Defaults to `True` where a GPU has it, if `fp16` is not set, instead of `False`.
    > - `optim`: Defaults to `"muon"`, Muon on matrices and AdamW on the rest ([`MuonWithAdamW`]), which transformers
    >   has no name for; its own names stand beside it.
    > - `learning_rate`: Defaults to `2e-3` with `muon` on greedy text and `1e-3` on drawn text, and to `3e-4` with any
    >   other optimizer, instead of `5e-5`.
    > - `lr_scheduler_type`: Defaults to `"cosine"` instead of `"linear"`.
    > - `warmup_steps`: Defaults to `0.05`, a share of all steps, instead of `0`.
    > - `remove_unused_columns` and `ddp_find_unused_parameters`: Default to `False`.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "teacher_model_init_kwargs",
        "chat_template_kwargs",
    ]

    # Parameters whose default values are overridden from TrainingArguments
    optim: str = _of_recipe("muon, or one that transformers has a name for.")
    learning_rate: float | None = _of_recipe("Peak learning rate; muon 2e-3, on drawn text 1e-3; others 3e-4.")
    lr_scheduler_type: str = _of_recipe("Learning-rate schedule.")
    warmup_steps: float = _of_recipe("Warm-up steps, or a share of all steps below 1.")
    num_train_epochs: float = _of_recipe("Passes over the prompts.")
    per_device_train_batch_size: int = _of_recipe("Texts of a micro-step, on each device.")
    gradient_accumulation_steps: int = _of_recipe("Micro-steps of an optimizer step.")
    gradient_checkpointing: bool | None = _field("Drafters are shallow: off.")
    remove_unused_columns: bool = _field("Columns are checked by the trainer.", False)
    ddp_find_unused_parameters: bool | None = _field("Every parameter is used.", False)

    recipe: str = _field("Where what is not given comes from.", "default", choices=recipe_names())

    # Parameters that control the drafter and the target
    model_init_kwargs: dict[str, Any] | str | None = _field("For the drafter.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = _field("For the target.")
    disable_dropout: bool = _field("Turn dropout off in the drafter.", True)

    # Parameters that control the prompts
    max_prompt_length: int | None = _of_recipe("Longest prompt, in tokens.")
    truncate_prompts: bool = _field("Cut longer prompts from the left.", False)
    chat_template_kwargs: dict[str, Any] | str | None = _field("For the template.")
    shuffle_dataset: bool = _field("Shuffle prompts.", True)

    # Parameters that control the texts
    rollout_source: str = _field("Who writes the text.", "speculation", choices=list(ROLLOUT_SOURCES))
    max_completion_length: int = _of_recipe("Longest completion, in tokens.")
    temperature: float = _of_recipe("Sampling temperature of the target; 0 is greedy.")
    top_k: int = _field("Top-k of the target; 0 keeps all.", 0)
    top_p: float = _field("Top-p of the target.", 1.0)
    sample_proposals: bool = _field("Draw proposals instead of taking the argmax.", False)
    rollout_batch_size: int = _field("Texts decoded side by side.", 32)
    steps_per_generation: int | None = _field("Micro-steps a set of texts serves.")
    regenerate_every: int = _field("Epochs that a drawn text serves.", 1)
    text_cache_dir: str | None = _field("Where written texts are kept.")
    state_store_gib: float = _field("GiB for the target's states of texts it has read.", 0.0)
    state_store_dir: str | None = _field("Keep these on disk, there.")
    state_store_dtype: str | None = _field("What these are rounded to.")
    num_texts_to_check: int = _field("Texts of the data set the target reads first.", 16)

    # Parameters that control the server
    server_url: str | None = _field("Completions server, as http://localhost:8000.")
    server_model: str | None = _field("Model to ask the server for.")
    server_token: str | None = _field("Bearer token for the server.")
    server_timeout: float = _field("Seconds an answer of the server may take.", 600.0)
    server_concurrency: int = _field("Requests under way at once, a process.", 64)
    server_max_retries: int = _field("Repetitions of a failed request.", 5)
    server_reload_steps: int | None = _field("Steps between drafters handed to the server.")
    server_reload_command: str | None = _field("What has the server load the folder behind it.")

    # Parameters that control what is replayed
    lmbda: float = _of_recipe("On-policy share: 1 is Draft-OPD, 0 is SFT.")
    lmbda_end: float | None = _field("What lmbda goes to over the run.")
    anchors: str = _of_recipe(f"Where on-policy blocks start: {' or '.join(ANCHORS)}.")
    num_anchors: int = _field("Most blocks trained on, a text.", 512)
    num_chains: int = _field("Anchors a text drafted at once; speed only.", 8)
    replay_buffer_size: int = _field("Texts whose error positions are remembered.", 0)
    replay_ratio: float = _field("Remembered texts drawn for each new one.", 0.0)
    replay_by_loss: bool = _field("Draw remembered positions by their last loss.", False)

    # Parameters that control the losses
    teacher_temperature: float | None = _of_recipe("The rollout's by default.")
    accepted_loss: str | None = _of_recipe(f"One of {', '.join(LOSSES)}.")
    rejected_loss: str | None = _of_recipe(f"One of {', '.join(LOSSES)}.")
    accepted_weight: float = _of_recipe("Weight of the accepted stream.")
    rejected_weight: float = _of_recipe("Weight of the rejected stream.")
    accepted_decay: float = _of_recipe("Decay along the accepted stream.")
    rejected_decay: float = _of_recipe("Decay along the rejected stream.")
    sft_decay: float | None = _of_recipe("Decay along SFT blocks.")
    dpace_alpha: float | None = _of_recipe("Weights by D-PACE instead of both decays.")
    beta: float = _field("Interpolation of jsd: 0 forward, 1 reverse KL.", 0.5)
    loss_max_clamp: float | None = _of_recipe("Ceiling of a slot's loss.")
    log_prob_min_clamp: float | None = _of_recipe("Floor of sampled log-probabilities.")
    loss_chunk_size: int = _field("Slots projected to the vocabulary at once.", 256)

    # Parameters that control the logging
    log_completions: bool = _field("Print a few texts at each log, as blocks.", False)
    num_completions_to_print: int = _field("How many texts to print.", 2)
    serve_batch_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Batch sizes to say for how many proposals to serve with."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            `ValueError` or `TypeError`: A setting is of the wrong type, outside its range, or contradicts another.
        """
        for name in self._VALID_DICT_FIELDS:
            # As the command line gives mappings.
            value = getattr(self, name)
            if isinstance(value, str) and (name not in _FILES or value.startswith("{")):
                setattr(self, name, read_json(name, value))
        self.report_to = "none" if self.report_to is None else self.report_to
        check_value("recipe", self.recipe, str, one_of(*recipe_names()), default="default")
        defaults = defaults_of(self, self.recipe)
        fill(self, defaults)
        settle(
            self,
            LIMITS,
            hints=_ALSO,
            defaults=defaults,
            optim=one_of(MUON, *(name.value for name in OptimizerNames)),
            rollout_source=one_of(*ROLLOUT_SOURCES),
            anchors=one_of(*ANCHORS),
            accepted_loss=one_of(*LOSSES),
            rejected_loss=one_of(*LOSSES),
            report_to=one_of("none", "all", *TRACKERS),
        )
        self._choose_device()
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.lr_scheduler_type in SCHEDULES_BY_METRIC
        ):
            # transformers would look for a loss, which is not measured.
            self.metric_for_best_model = "acceptance_length"
        if self.learning_rate is None:
            self.learning_rate = peak_rate(self.optim, self.sampling.greedy)
        optim = self.optim
        if optim == MUON:
            self.optim = _BaseConfig.optim  # as transformers takes no names but its own
        # What was chosen here is no setting of the user's, and so no cause.
        chosen = {name: getattr(self, name) for name in ("optim", "learning_rate")} if optim == MUON else {}
        as_input_errors(self, {**defaults, **chosen}, super().__post_init__)
        if optim == MUON:
            self.optim = MUON
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.teacher_temperature is None:
            self.teacher_temperature = self.temperature
        hard = self.teacher_temperature == 0
        self.accepted_loss = self.accepted_loss or ("ce" if hard else "forward_kl")
        self.rejected_loss = self.rejected_loss or ("ce" if hard else "reverse_kl")
        check_together(self)
        check_trackers(self)
        check_backend(self)
        try_schedule(self)
        try_optimizer(self)

    def _choose_device(self) -> None:
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            if self.fp16:
                raise InputError("fp16=True, but there is no GPU. Leave `fp16` unset, or set bf16=True.")
            # Autocast pays on a CPU with instructions for bfloat16, and costs on others: only where it is asked for.
            self.bf16, self.use_cpu = bool(self.bf16), True
        elif self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    # -- what rooms are given: each takes one of these, and answers its own questions --------------------------------

    @property
    def sampling(self) -> SamplingParams:
        """The law of the target's text."""
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def on_policy(self) -> OnPolicySettings:
        """Which blocks are replayed."""
        return OnPolicySettings(
            anchors=self.anchors,
            num_anchors=self.num_anchors,
            num_chains=self.num_chains,
            replay_ratio=self.replay_ratio,
        )

    @property
    def streams(self) -> StreamSettings:
        """Which slots teach, and how much."""
        return StreamSettings(
            accepted_weight=self.accepted_weight,
            rejected_weight=self.rejected_weight,
            rejected_decay=self.rejected_decay,
            accepted_decay=self.accepted_decay,
            sft_decay=self.sft_decay if self.dpace_alpha is None else 1.0,
        )

    @property
    def losses(self) -> StreamLosses:
        """What they teach."""
        streams = {"accepted": self.accepted_weight, "rejected": self.rejected_weight}
        settings = {
            name: LossSettings(
                # A stream that is off may name any loss, also one that its teacher could not have.
                kind=getattr(self, f"{name}_loss") if weight > 0 else "ce",
                temperature=self.teacher_temperature,
                beta=self.beta,
                max_clamp=self.loss_max_clamp,
                log_prob_min_clamp=self.log_prob_min_clamp,
                dpace_alpha=self.dpace_alpha if name == "accepted" else None,
            )
            for name, weight in streams.items()
        }
        return StreamLosses(**settings, chunk_size=self.loss_chunk_size)

    @property
    def any_on_policy(self) -> bool:
        """Whether any text of the run is replayed on-policy."""
        return self.lmbda > 0 or bool(self.lmbda_end)

    def lmbda_at(self, step: int, steps: int) -> float:
        """`lmbda` at one of the optimizer steps of a run."""
        if self.lmbda_end is None:
            return self.lmbda
        return self.lmbda + step / max(steps - 1, 1) * (self.lmbda_end - self.lmbda)
