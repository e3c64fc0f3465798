"""The memory plan: against real bytes, what each setting does to it, and what it refuses."""

import copy
import json

import pytest
import torch
from conftest import ANY_KIND, tiny_drafter, tiny_model, tiny_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer, MuonWithAdamW
from draft_opd_trl.commands import plan as command
from draft_opd_trl.commands.options import AdapterArguments
from draft_opd_trl.core.shapes import LiveBytes, Shapes
from draft_opd_trl.core.target import Target
from draft_opd_trl.core.terminal import as_text
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.folders.checkpoints import load_drafter_config
from draft_opd_trl.training.divergences import LossSettings
from draft_opd_trl.training.losses import Heads, slot_losses
from draft_opd_trl.training.planning import MemoryPlan, find_levers, plan_memory


# Big enough that what a step holds outweighs what Python keeps around.
SIZES = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 512, "head_dim": 16}
PROMPT_LENGTH = 8


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen3", vocab_size=512, **{k: v for k, v in SIZES.items() if k != "vocab_size"})
    model.generation_config.eos_token_id = 1
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # never the likeliest, so no text ends early
    return model


def settings(folder="unused", **options):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "max_completion_length": 12,
        "rollout_source": "dataset",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DraftOPDConfig(str(folder), **{**defaults, **options})


def drafter_for(model, kind):
    torch.manual_seed(0)
    return tiny_drafter(kind, Target(model), init_from_target=False)


def planned(model, drafter, args, **options):
    return plan_memory(model.config, drafter.config, args, prompt_length=PROMPT_LENGTH, **options)


def held_by(*models):
    return [tensor for m in models for tensor in (*m.parameters(), *m.buffers())]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpointing": True, "loss_chunk_size": 64, "lmbda": 0.0},
        {"rejected_weight": 1.0, "num_anchors": 16},
        {"temperature": 1.0, "lmbda": 0.0, "gradient_accumulation_steps": 3, "num_anchors": 8},
        {"rollout_source": "speculation", "gradient_accumulation_steps": 4, "num_anchors": 4},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "defaults",
)
def test_the_plan_is_what_a_run_holds(model, kind, tmp_path, options):
    drafter = drafter_for(model, kind)
    args = settings(tmp_path, max_completion_length=48, **options)
    draws = torch.Generator().manual_seed(0)
    rows = 2 * args.per_device_train_batch_size * args.steps_per_generation
    texts = torch.randint(2, 512, (rows, PROMPT_LENGTH + args.max_completion_length), generator=draws)
    columns = {"prompt_ids": texts[:, :PROMPT_LENGTH].tolist(), "completion_ids": texts[:, PROMPT_LENGTH:].tolist()}
    dataset = Dataset.from_dict(columns)
    trainer = DraftOPDTrainer(drafter, model, args, dataset, processing_class=tiny_tokenizer())
    trainer._before_training = lambda: None  # the plan that a run announces is not part of it
    with LiveBytes(held_by(model, drafter)) as live:
        trainer.train()
    measured = sum(tensor.nbytes for tensor in held_by(model, drafter)) + live.peak
    assert planned(model, drafter, args).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_kernel_holds_less_than_the_chunks_that_a_plan_counts(monkeypatch, divergence):
    """Plans are made as on a CPU; the vocabulary is Qwen3's."""
    peaks = {}
    for in_kernel in (True, False):
        monkeypatch.setattr("draft_opd_trl.training.losses.uses_kernel", lambda *_, answer=in_kernel: answer)
        with Shapes() as shapes:
            head = torch.empty(151_936, 64, dtype=torch.bfloat16)
            hidden = torch.empty(1024, 64, dtype=torch.bfloat16, requires_grad=True)
            tokens = torch.zeros(1024, dtype=torch.long)
            heads = Heads(
                lambda states, head=head: states @ head.T,
                lambda states, head=head: (states @ head.T).float(),
                None,
                head,
                head,
            )
            held = shapes.begin()
            slot_losses(hidden, hidden.detach(), tokens, heads, LossSettings(divergence, 1.0))[0].sum().backward()
            peaks[in_kernel] = shapes.peak - held
    assert peaks[True] < peaks[False]


def test_parts_follow_the_settings_that_bound_them(model, kind):
    drafter = drafter_for(model, kind)

    def parts(**options):
        plan = planned(model, drafter, settings(rollout_source="speculation", **options))
        return {name: size for phase in plan.phases.values() for name, size in phase.items()} | plan.always

    def shrinks(part, **options):
        return parts(**options)[part] < plain[part]

    plain = parts()
    assert shrinks("drafter activations and loss chunks", num_anchors=6)
    assert shrinks("drafter activations and loss chunks", per_device_train_batch_size=1)
    assert shrinks("target's KV cache", rollout_batch_size=1)
    assert shrinks("target's KV cache", max_completion_length=6)
    assert shrinks("optimizer state", optim="adamw_8bit")
    many = parts(gradient_accumulation_steps=4)
    name = "features and target states of the step"
    assert many[name] == 4 * plain[name]
    assert parts(rejected_weight=1.0)["kept verification states"] > 0


def test_weights_and_optimizer_states_are_exact(model, kind):
    drafter = drafter_for(model, kind)
    always = planned(model, drafter, settings(optim="adamw_torch")).always
    trainable = sum(parameter.numel() for parameter in drafter.parameters())
    assert always["target weights"] == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert always["drafter weights"] == sum(tensor.nbytes for tensor in (*drafter.parameters(), *drafter.buffers()))
    # Two moments, and a step counter a parameter.
    assert always["optimizer state"] == 8 * trainable + 4 * len(list(drafter.parameters()))
    muon = planned(model, drafter, settings()).always["optimizer state"]
    assert 4 * trainable < muon < 5 * trainable
    assert planned(model, drafter, settings(), make_optimizer=MuonWithAdamW).always["optimizer state"] == muon
    halved = planned(model, drafter, settings(), drafter_dtype=torch.bfloat16).always["drafter weights"]
    assert halved < 0.6 * always["drafter weights"]


def test_mixed_precision_halves_activations(model, kind):
    drafter = drafter_for(model, kind)
    name = "drafter activations and loss chunks"
    mixed = settings(bf16=True)
    plans = [planned(model, drafter, args) for args in (settings(), mixed)]
    full, mixed = (plan.phases["training"][name] for plan in plans)
    assert 0.4 * full < mixed < 0.9 * full


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_a_quantised_target_is_as_large_as_bitsandbytes_makes_it(model, kind, tmp_path, options):
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
    drafter = drafter_for(model, kind)
    plan = plan_memory(quantised.config, drafter.config, settings(), prompt_length=PROMPT_LENGTH)
    size = quantised.get_memory_footprint()
    for module in quantised.modules():
        state = getattr(module.weight, "quant_state", None) if hasattr(module, "weight") else None
        size += state.absmax.nbytes if state is not None else 0
    assert plan.always["target weights"] == pytest.approx(size, rel=0.03)
    assert plan.always["target weights"] < planned(model, drafter, settings()).always["target weights"]


def test_levers_are_measured_and_sorted(model):
    drafter, args = drafter_for(model, ANY_KIND), settings()
    plan = planned(model, drafter, args)
    levers = find_levers(plan, model.config, drafter.config, args, prompt_length=PROMPT_LENGTH)
    assert list(levers.values()) == sorted(levers.values(), reverse=True)
    assert "num_anchors=5" in levers
    halved = copy.copy(args)
    halved.per_device_train_batch_size = 1
    freed = plan.peak - planned(model, drafter, halved).peak
    assert levers["per_device_train_batch_size=1"] == freed > 0
    # Nothing is decoded here, so decoding fewer rows side by side frees nothing.
    assert not any(name.startswith("rollout_batch_size") for name in levers)


def test_training_begins_with_the_plan(model, kind, tmp_path, capsys):
    drafter = drafter_for(model, kind)
    columns = {"prompt_ids": [[5, 6]] * 3, "completion_ids": [[7] * 10] * 3}
    args = settings(tmp_path, max_steps=1)
    trainer = DraftOPDTrainer(drafter, model, args, Dataset.from_dict(columns), processing_class=tiny_tokenizer())
    trainer.train()
    assert plan_memory(model.config, drafter.config, args, prompt_length=2).line() in capsys.readouterr().out


def test_a_model_that_cannot_be_rehearsed_trains_all_the_same(model, tmp_path, capsys, monkeypatch):
    columns = {"prompt_ids": [[5, 6]] * 3, "completion_ids": [[7] * 10] * 3}
    args = settings(tmp_path, max_steps=1)
    drafter = drafter_for(model, ANY_KIND)
    trainer = DraftOPDTrainer(drafter, model, args, Dataset.from_dict(columns), processing_class=tiny_tokenizer())
    monkeypatch.setattr(model.config, "quantization_config", {"quant_method": "gptq"}, raising=False)
    trainer.train()
    assert "no memory plan for this model: The target's quantization_config" in capsys.readouterr().out
    assert trainer.state.global_step == 1


def test_the_command_plans_from_two_configs(model, kind, tmp_path):
    drafter = drafter_for(model, kind)
    model.config.save_pretrained(tmp_path / "target")
    drafter.config.save_pretrained(tmp_path / "drafter")
    assert type(load_drafter_config(tmp_path / "drafter")) is DRAFTERS[kind].config_class
    memory = 0.001 if kind == ANY_KIND else 80
    arguments = command.PlanArguments(str(tmp_path / "drafter"), str(tmp_path / "target"), device_memory=memory)
    result = command.run(arguments, AdapterArguments(), settings(max_prompt_length=PROMPT_LENGTH))
    assert result == json.loads(json.dumps(result))
    mixed = settings()
    mixed.bf16 = True
    plan = planned(model, drafter, mixed)
    assert result["peak"] == plan.peak
    shown = command.show(result)
    assert as_text(plan.table()) in shown
    assert ("It does not fit: the plan's" in shown and "num_anchors=5 frees" in shown) == (kind == ANY_KIND)
    assert ("It fits: the plan's" in shown and "of the device's 80 GiB" in shown) == (kind != ANY_KIND)
    packed = command.PlanArguments(str(tmp_path / "drafter"), str(tmp_path / "target"), load_in_4bit=True)
    packed = command.run(packed, AdapterArguments(), settings(max_prompt_length=PROMPT_LENGTH))
    assert packed["always"]["target weights"] < plan.always["target weights"]


def test_an_adapter_is_counted_as_a_run_trains_it(model, kind, tmp_path, capsys):
    drafter = drafter_for(model, kind)
    drafter.save_pretrained(tmp_path / "drafter")
    model.config.save_pretrained(tmp_path / "target")
    args = settings(tmp_path, max_steps=1, max_prompt_length=2, optim="adamw_torch")
    lora = AdapterArguments(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "down_proj"])
    paths = command.PlanArguments(str(tmp_path / "drafter"), str(tmp_path / "target"))
    whole, adapted = (command.run(paths, adapter, args) for adapter in (AdapterArguments(), lora))
    columns = {"prompt_ids": [[5, 6]] * 3, "completion_ids": [[7] * 10] * 3}
    dataset, tokenizer = Dataset.from_dict(columns), tiny_tokenizer()
    trainer = DraftOPDTrainer(
        drafter, model, args, dataset, processing_class=tokenizer, peft_config=lora.peft_config()
    )
    trainable = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert adapted["always"]["drafter weights"] == sum(tensor.nbytes for tensor in held_by(trainer.model))
    assert adapted["phases"]["training"]["gradients"] == sum(weight.nbytes for weight in trainable)
    assert adapted["always"]["optimizer state"] == 8 * sum(map(torch.numel, trainable)) + 4 * len(trainable)
    assert adapted["peak"] < whole["peak"]
    trainer.train()
    plan = plan_memory(model.config, drafter.config, args, prompt_length=2, peft_config=lora.peft_config())
    assert plan.line() in capsys.readouterr().out


def test_the_table_adds_up():
    plan = MemoryPlan({"weights": 3 * 2**30}, {"a": {"x": 2**30, "y": 2**29}, "b": {"x": 2**31}}, {"texts": 4})
    assert plan.fullest == "b" and plan.peak == 5 * 2**30
    cells = [line.split() for line in as_text(plan.table()).splitlines()]
    assert ["b", "(fullest)", "2.000"] in cells and ["y", "0.500"] in cells
    assert ["peak:", "whole", "run", "+", "fullest", "phase", "5.000"] in cells
    assert plan.line() == "memory plan (GiB): 5 at most = whole run 3 + the fullest of: a 1.5, b 2"


def test_refusals_name_value_and_remedy(model):
    drafter = drafter_for(model, ANY_KIND)
    with pytest.raises(ValueError, match="max_prompt_length is unset"):
        plan_memory(model.config, drafter.config, settings(max_prompt_length=None))
    config = copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="gptq.*unquantised"):
        plan_memory(config, drafter.config, settings(), prompt_length=PROMPT_LENGTH)
    with pytest.raises(ValueError, match="Qwen3Config is the config of no drafter"):
        plan_memory(model.config, Qwen3Config(), settings(), prompt_length=PROMPT_LENGTH)
