"""Short training runs: their texts, what they have in common, and what is read of them."""

import torch
from conftest import STOPS, tiny_tokenizer
from datasets import Dataset
from transformers import TrainerCallback

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer, SamplingParams, SpeculationSettings, speculate
from draft_opd_trl.core.target import Target


# A field that `options` name takes another value; arguments of the trainer itself stand among them by name.
DEFAULTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_completion_length": 20,
    "num_anchors": 6,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "rollout_source": "dataset",
}
BESIDE = ("eval_dataset", "peft_config", "callbacks", "optimizers", "quantization_config")


def make_trainer(drafter, target, dataset, output_dir, tokenizer=None, trainer_class=DraftOPDTrainer, **options):
    """A trainer of `drafter` for `target`, each a model or a path; the tokenizer is the tiny one unless given."""
    beside = {name: options.pop(name) for name in BESIDE if name in options}
    args = DraftOPDConfig(str(output_dir), **{**DEFAULTS, **options})
    return trainer_class(
        drafter, target, args, train_dataset=dataset, processing_class=tokenizer or tiny_tokenizer(), **beside
    )


def spelled_prompts(count):
    """Prompts of three to six of the tiny tokenizer's letters."""
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(5, 30, (3 + i % 4,), generator=draws).tolist() for i in range(count)]


def written_texts(model, prompts, temperature=0.0):
    """The texts of up to twenty tokens that the target writes, as a data set."""
    settings = SpeculationSettings(20, STOPS, SamplingParams(temperature), batch_size=16)
    rollout = speculate(Target(model), None, prompts, settings, torch.Generator().manual_seed(5))
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": rollout.completions()})


class StopAt(TrainerCallback):
    """Ends a run early without changing its schedule, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def parameters_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.drafter.named_parameters()}


def figures_of(trainer):
    """All that was logged of training steps, times aside."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [{name: value for name, value in log.items() if "time" not in name} for log in logs]
