"""Muon and AdamW as one optimizer, against a slow reference of each, and what the Trainer asks of it."""

import copy
import re

import pytest
import torch
from conftest import ANY_KIND, tiny_drafter
from peft import LoraConfig
from runs import make_trainer, spelled_prompts, written_texts
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback

from draft_opd_trl import MuonWithAdamW
from draft_opd_trl.core.target import Target


LR, ADAMW_LR, DECAY = 0.02, 0.005, 0.1


def network(seed=0):
    """Matrices of both orientations, vectors, a kernel of three dimensions, and a matrix that is not trained."""
    torch.manual_seed(seed)
    frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
    return nn.ModuleDict(
        {"tall": nn.Linear(4, 9), "wide": nn.Linear(9, 3), "kernel": nn.Conv1d(3, 2, 1), "frozen": frozen}
    )


def give_gradients(model, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=draws)


def orthogonal(matrix):
    """Five steps of the quintic Newton-Schulz iteration (Jordan et al. 2024), in bfloat16 as torch has it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T

    def rounded(values):
        return values.bfloat16().float()

    wide = rounded(wide)
    wide = rounded(wide / rounded(wide.norm()))
    for _ in range(5):
        gram = rounded(wide @ wide.T)
        wide = rounded(a * wide + rounded(b * gram + c * gram @ gram) @ wide)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def muon_step(weight, gradient, state, lr):
    """Nesterov momentum, made orthogonal, and scaled so that its elements are as large as AdamW's."""
    momentum = state.setdefault("momentum", torch.zeros_like(weight))
    momentum.mul_(0.95).add_(0.05 * gradient)
    update = orthogonal(0.05 * gradient + 0.95 * momentum)
    weight.mul_(1 - lr * DECAY).sub_(lr * 0.2 * max(weight.shape) ** 0.5 * update)


def adamw_step(weight, gradient, state, lr):
    state["steps"] = state.get("steps", 0) + 1
    first, second = (state.setdefault(name, torch.zeros_like(weight)) for name in ("first", "second"))
    first.mul_(0.9).add_(0.1 * gradient)
    second.mul_(0.999).add_(0.001 * gradient**2)
    first, second = first / (1 - 0.9 ** state["steps"]), second / (1 - 0.999 ** state["steps"])
    weight.mul_(1 - lr * DECAY).sub_(lr * first / (second.sqrt() + 1e-8))


def test_steps_are_those_of_the_reference():
    model = network()
    optimizer = MuonWithAdamW(model.parameters(), lr=LR, adamw_lr=ADAMW_LR, weight_decay=DECAY)
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    states = {name: {} for name in expected}
    for step in range(4):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                take, lr = (muon_step, LR) if parameter.ndim == 2 else (adamw_step, ADAMW_LR)
                take(expected[name], parameter.grad, states[name], lr)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name


def test_matrices_go_to_muon_the_rest_to_adamw_and_the_frozen_nowhere():
    model = network()
    muon, adamw = MuonWithAdamW(model.parameters()).parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = [
        [names[parameter] for group in part.param_groups for parameter in group["params"]] for part in (muon, adamw)
    ]
    assert taken == [["tall.weight", "wide.weight"], ["tall.bias", "wide.bias", "kernel.weight", "kernel.bias"]]
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)


@pytest.mark.parametrize("shape", [(3, 4), (5,)], ids=["matrices", "vectors"])
def test_parameters_of_one_sort_alone_will_do(shape):
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = MuonWithAdamW([parameter], lr=LR)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    assert len(optimizer.parts) == 1 and bool((parameter < 1).all())


@pytest.mark.parametrize(("given", "taken"), [(None, LR), (ADAMW_LR, ADAMW_LR), (0.0, 0.0)])
def test_the_rate_of_adamw_is_what_it_is_given(given, taken):
    optimizer = MuonWithAdamW(network().parameters(), lr=LR, adamw_lr=given)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, taken]


def test_a_run_that_is_taken_up_from_its_state_goes_on_the_same():
    whole, model = network(), network()
    never_left = MuonWithAdamW(whole.parameters(), lr=LR, adamw_lr=ADAMW_LR)
    optimizer = MuonWithAdamW(model.parameters(), lr=LR, adamw_lr=ADAMW_LR)
    for step in range(5):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = MuonWithAdamW(model.parameters(), lr=9.0)
            optimizer.load_state_dict(state)
        for each, taking in ((whole, never_left), (model, optimizer)):
            give_gradients(each, step)
            taking.step()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_state_of_other_parameters_is_refused():
    state = MuonWithAdamW(network().parameters()).state_dict()
    with pytest.raises(ValueError):
        MuonWithAdamW([nn.Parameter(torch.ones(3, 3))]).load_state_dict(state)


def test_a_schedule_moves_both_rates_also_after_loading():
    model = network()
    optimizer = MuonWithAdamW(model.parameters(), lr=LR, adamw_lr=ADAMW_LR)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    give_gradients(model, 0)
    optimizer.step()
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [LR / 2, ADAMW_LR / 2]


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    model = network()
    optimizer = MuonWithAdamW(model.parameters())
    before = model["tall"].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = functional.mse_loss(model["tall"](torch.ones(1, 4)), torch.zeros(1, 9))
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss > 0 and not torch.equal(model["tall"].weight, before)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_groups_keep_what_is_their_own_and_the_state_has_the_usual_form():
    model = network()
    vectors, weights = (
        [one for one in model.parameters() if (one.ndim == 1) == is_vector] for is_vector in (True, False)
    )
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = MuonWithAdamW(groups, lr=LR, betas=(0.8, 0.9), eps=1e-3)
    told = [(group["weight_decay"], len(group["params"]), group.get("betas")) for group in optimizer.param_groups]
    assert told == [(DECAY, 2, None), (DECAY, 1, (0.8, 0.9)), (0.0, 3, (0.8, 0.9))]
    give_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"} and sorted(state["state"]) == list(range(6))


class OptimizerSeen(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.optimizer, self.schedule = optimizer.optimizer, lr_scheduler


@pytest.fixture(scope="module")
def texts(model):
    return written_texts(model, spelled_prompts(16))


def test_a_trainer_has_it_by_name_and_says_once_how_far_it_moves(model, texts, tmp_path, capsys):
    seen = OptimizerSeen()
    options = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2, "callbacks": [seen]}
    drafter = tiny_drafter(ANY_KIND, Target(model))
    matrices = [weight for weight in drafter.parameters() if weight.ndim == 2]
    size = sum(weight.detach().square().sum() for weight in matrices).sqrt()
    count = sum(weight.numel() for weight in matrices)
    make_trainer(drafter, model, texts, tmp_path, **options).train()
    muon, adamw = seen.optimizer.parts
    assert [id(one) for group in muon.param_groups for one in group["params"]] == [id(one) for one in matrices]
    assert {type(seen.optimizer), type(adamw)} == {MuonWithAdamW, torch.optim.AdamW}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("an update at the peak")]
    told = re.search(rf"moves {len(matrices)} matrices \({count:,} weights\) by ([\d.]+)%, \d+ other tensors", line)
    # Of the peak rate, though the first step that moves anything has half of it: a fifth of it an element.
    assert float(told[1]) / 100 == pytest.approx(0.2 * 1e-2 * count**0.5 / float(size), rel=0.3)


def test_an_adapter_is_trained_by_it_too(model, texts, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = make_trainer(tiny_drafter(ANY_KIND, Target(model)), model, texts, tmp_path, peft_config=lora)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
