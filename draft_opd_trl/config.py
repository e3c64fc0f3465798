"""`DraftOPDConfig`: every knob, checked for contradictions before anything expensive. Holds no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ._trl_compat import _BaseConfig
from .endpoint import without_credentials
from .errors import InputError
from .losses import HARD_LOSSES, LOSSES


ROLLOUT_SOURCES = ("speculation", "generate", "server", "dataset")
ANCHORS = ("exposed", "random")
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
        if self.recipe not in RECIPES:
            raise InputError(f"`recipe` is {self.recipe!r}; choose from {', '.join(RECIPES)}.")
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            if self.bf16:
                raise InputError(
                    "bf16=True, but there is no GPU, and drafters train on CPU in float32 here. Leave `bf16` unset "
                    "or set it to False."
                )
            self.bf16, self.use_cpu = False, True
        elif self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.teacher_temperature is None:
            self.teacher_temperature = self.temperature
        hard = self.teacher_temperature == 0
        self.accepted_loss = self.accepted_loss or ("ce" if hard else "forward_kl")
        self.rejected_loss = self.rejected_loss or ("ce" if hard else "reverse_kl")
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        def need(name: str, holds: bool, reason: str) -> None:
            if not holds:
                raise InputError(f"`{name}` is {getattr(self, name)!r}; {reason}.")

        need("lmbda", 0 <= self.lmbda <= 1, "it is the on-policy share and must lie in [0, 1]")
        if self.lmbda_end is not None:
            need("lmbda_end", 0 <= self.lmbda_end <= 1, "it is the on-policy share and must lie in [0, 1]")
        need("anchors", self.anchors in ANCHORS, f"choose from {', '.join(ANCHORS)}")
        need("rollout_source", self.rollout_source in ROLLOUT_SOURCES, f"choose from {', '.join(ROLLOUT_SOURCES)}")
        for name in ("accepted_loss", "rejected_loss"):
            need(name, getattr(self, name) in LOSSES, f"choose from {', '.join(LOSSES)}")
        for name in ("temperature", "teacher_temperature", "accepted_weight", "rejected_weight", "replay_ratio"):
            need(name, getattr(self, name) >= 0, "it must be 0 or positive")
        need("rejected_decay", 0 <= self.rejected_decay <= 1, "it must lie in [0, 1]")
        need("accepted_decay", 0 < self.accepted_decay <= 1, "it must lie in (0, 1]")
        counts = ("num_anchors", "num_chains", "max_completion_length", "rollout_batch_size", "loss_chunk_size")
        counts += ("steps_per_generation", "regenerate_every", "server_concurrency", "num_completions_to_print")
        for name in counts:
            need(name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("server_max_retries", "num_texts_to_check"):
            need(name, getattr(self, name) >= 0, "it must be 0 or positive")
        need("server_timeout", self.server_timeout > 0, "it must be positive")
        need("max_completion_length", self.max_completion_length >= 2, "a text of one token holds no block")
        need("top_p", 0 < self.top_p <= 1, "it must lie in (0, 1]")
        need("top_k", self.top_k >= 0, "0 keeps all tokens, a positive number keeps that many")
        need("beta", 0 <= self.beta <= 1, "it must lie in [0, 1]")

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
                f"{self.server_url and without_credentials(self.server_url)!r} do not go together: a server is asked "
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
