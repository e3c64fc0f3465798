"""Muon and AdamW as one optimizer, against a slow reference of each, and what the Trainer asks of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from draft_opd_trl import MuonWithAdamW


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
