"""Shards of one rank in this process, what is refused, and what is whole inside `gathered`.

Two ranks train alike in test_ranks.py."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_drafter, tiny_model
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, StateDictType
from torch.distributed.tensor import DTensor

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.replay import text_blocks
from draft_opd_trl.training.sharding import check_parallelism, gathered, shard


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=OffloadPolicy())),
)


def launched(zero_stage=None, **fsdp):
    deepspeed = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    plugin = None
    if fsdp:
        plugin = SimpleNamespace(**{"fsdp_version": 2, "state_dict_type": StateDictType.FULL_STATE_DICT, **fsdp})
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=plugin))


@pytest.fixture
def alone(tmp_path):
    """A group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def pair(kind):
    """A target and a drafter that nobody else holds: they are sharded in place."""
    target = Target(tiny_model("qwen3"))
    return target, tiny_drafter(kind, target)


def sharded(model):
    return {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}


@pytest.mark.parametrize(
    ("launcher", "told"),
    [
        (launched(zero_stage=3), "ZeRO-3.*zero_stage 2"),
        (launched(fsdp_version=1), "fsdp_version is 1.*fsdp_version: 2"),
        (launched(state_dict_type=StateDictType.SHARDED_STATE_DICT), "SHARDED_STATE_DICT.*FULL_STATE_DICT"),
    ],
)
def test_what_cannot_be_trained_in_is_refused_with_what_can(launcher, told):
    with pytest.raises(ValueError, match=told):
        check_parallelism(launcher, muon=False)


@pytest.mark.parametrize("launcher", [launched(), launched(zero_stage=2), launched(fsdp_version=2)])
def test_other_launchers_pass(launcher):
    check_parallelism(launcher, muon=False)


def test_muon_is_refused_where_weights_are_flattened_and_nowhere_else():
    with pytest.raises(ValueError, match=r"\(optim: muon\), but DeepSpeed.*Set optim: adamw_torch, or launch"):
        check_parallelism(launched(zero_stage=2), muon=True)
    for launcher in (launched(), launched(fsdp_version=2)):
        check_parallelism(launcher, muon=True)


def test_layers_of_the_target_and_the_whole_drafter_are_spread_and_say_the_same(alone, pair):
    target, drafter = pair
    tokens = torch.arange(2, 42).reshape(2, 20)
    texts = Rollout(tokens, torch.tensor([4, 4]), torch.tensor([20, 20]))
    blocks = text_blocks(texts, torch.tensor([0, 1, 1]), torch.tensor([5, 6, 9]), drafter.num_draft_tokens)

    def said():
        features, states = target.forward_text(tokens, drafter.target_layer_ids)
        with torch.no_grad(), gathered(drafter):
            return features, target.logits(states), drafter.draft(features, tokens, blocks)

    before = said()
    shard(target, drafter, ACCELERATOR)
    layers = {name for name, _ in target.model.named_parameters() if ".layers." in name}
    assert sharded(target.model) == layers and layers
    assert sharded(drafter) == {name for name, _ in drafter.named_parameters()}
    for mine, theirs in zip(said(), before, strict=True):
        assert torch.equal(mine, theirs)


def test_a_quantised_target_stays_whole(alone, pair):
    target, drafter = pair
    target.model.hf_quantizer = object()
    shard(target, drafter, ACCELERATOR)
    assert not sharded(target.model) and sharded(drafter)


def test_weights_are_whole_inside_gathered_and_spread_behind_it_also_after_an_error(alone, pair):
    target, drafter = pair
    weights = {name: weight.detach().clone() for name, weight in drafter.named_parameters()}
    shard(target, drafter, ACCELERATOR)
    with pytest.raises(KeyError), gathered(drafter):
        assert not sharded(drafter)
        for name, weight in drafter.named_parameters():
            assert torch.equal(weight, weights[name])
        raise KeyError
    assert sharded(drafter) == weights.keys()


def test_a_model_that_is_not_sharded_is_left_alone(pair):
    _, drafter = pair
    with gathered(drafter):
        assert not isinstance(drafter, FSDPModule) and not sharded(drafter)
