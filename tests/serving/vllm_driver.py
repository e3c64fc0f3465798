"""Draft one block with vLLM's own config parser, model class and weight loader. Usage: JOBS RESULTS."""

import tempfile

import torch
from shared import CachedAttention, features, fill_with_nan, left_unset, main, masked, stub


_library = stub("uvloop", "xgrammar", "llguidance")

from vllm import _custom_ops as ops  # noqa: E402
from vllm.config import (  # noqa: E402
    CompilationConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment  # noqa: E402
from vllm.model_executor.model_loader import DefaultModelLoader  # noqa: E402
from vllm.model_executor.model_loader.utils import get_model_architecture  # noqa: E402
from vllm.model_executor.models import llama, qwen3, qwen3_dflash, registry  # noqa: E402
from vllm.transformers_utils.config import maybe_override_with_speculators  # noqa: E402
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config  # noqa: E402
from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id  # noqa: E402


def _rms_norm(out, states, weight, eps):
    wide = states.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(states.dtype)
    # A weight a layer: (layers, head_dim) on (layers, tokens, heads, head_dim).
    out.copy_(normed * (weight if weight.dim() == 1 else weight[:, None, None]))


def _rotary_embedding(positions, states, _, head_size, cos_sin, is_neox):
    assert is_neox
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    heads = states.view(len(positions), -1, head_size)
    first, second = heads.chunk(2, dim=-1)
    states.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).view_as(states))


# Kernels and subprocesses; everything that reads the folder stays vLLM's.
ops.rms_norm, ops.rotary_embedding = _rms_norm, _rotary_embedding
llama.Attention = qwen3.Attention = qwen3_dflash.Attention = CachedAttention
registry._run_in_subprocess = lambda function: function()


def _block(job, model, states, first_slot):
    """The draft model's states of a block behind `states`, from the first slot that proposes."""
    length, size = len(states), first_slot + len(job["draft_tokens"])
    for layer, causal in zip(model.model.layers, model.get_draft_attn_causal(), strict=True):
        layer.self_attn.attn.causal = causal
    model.precompute_and_store_context_kv(states, torch.arange(length), torch.arange(length))
    ids = masked(job["tokens"][-1], get_parallel_drafting_token_id(model.config), size)
    return model(ids, length + torch.arange(size))[first_slot:]


def _dflash(job, model, states):
    return {"logits": model.compute_logits(_block(job, model, states, 1))}


def _dspark(job, model, states):
    """As `DSparkSpeculator` does."""
    hidden = _block(job, model, states, 0 if getattr(model.config, "sample_from_anchor", True) else 1)
    before = torch.cat([job["tokens"][-1:], job["draft_tokens"][:-1]])
    embedded = model.markov_embed(before)
    drafted = {"logits": model.compute_draft_logits(hidden) + model.markov_bias(embedded)}
    if model.model.confidence_head is not None:
        drafted["confidence"] = model.compute_confidence(hidden, embedded).logit()
    return drafted


def _eagle3(job, model, states):
    tokens, length = job["tokens"], len(job["tokens"])
    hidden, fed_back = model(tokens[1:], torch.arange(length - 1), states)
    logits = [model.compute_logits(hidden[-1:])]
    for slot in range(1, len(job["draft_tokens"])):
        token = job["draft_tokens"][slot - 1 : slot]
        hidden, fed_back = model(token, torch.tensor([length - 2 + slot]), fed_back[-1:])
        logits.append(model.compute_logits(hidden))
    return {"logits": torch.cat(logits)}


def _plain(job, model, states):
    """A whole language model, which reads the text."""
    ids, positions, logits = job["tokens"], torch.arange(len(job["tokens"])), []
    for slot in range(len(job["draft_tokens"])):
        logits.append(model.compute_logits(model(ids, positions)[-1:]))
        ids, positions = job["draft_tokens"][slot : slot + 1], positions[-1:] + 1
    return {"logits": torch.cat(logits)}


DRAFTS = {"dflash": _dflash, "dspark": _dspark, "eagle3": _eagle3, "draft_model": _plain}


def draft(job):
    trust = job["trust_remote_code"]
    # What `vllm serve FOLDER` makes of the folder: of a flat one nothing.
    served = maybe_override_with_speculators(job["folder"], job["folder"], trust, None, None)
    target_config = ModelConfig(
        model=job["target"], tokenizer=job["target"], dtype=job["dtype"], trust_remote_code=trust
    )
    parallel = ParallelConfig()
    speculative = SpeculativeConfig(
        model=job["folder"],
        target_model_config=target_config,
        target_parallel_config=parallel,
        **job["launch"]["vllm"],
    )
    config = VllmConfig(
        model_config=target_config,
        speculative_config=speculative,
        parallel_config=parallel,
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(mode=0, custom_ops=["none"]),
    )
    draft_config = speculative.draft_model_config
    if speculative.uses_draft_model():
        config.model_config = draft_config
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as store:
        init_distributed_environment(1, 0, f"file://{store.name}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model_architecture(draft_config)[0](vllm_config=config, prefix="draft")
        fill_with_nan(model)
        DefaultModelLoader(LoadConfig()).load_weights(model, draft_config)
        unset = left_unset(model)

        # What vLLM lends of the target.
        if "model.embed_tokens.weight" in unset:
            model.model.embed_tokens.weight.data.copy_(job["embedding"])
        if "lm_head.weight" in unset:
            model.lm_head.weight.data.copy_(job["head"])
        taps = get_eagle3_aux_layers_from_config(speculative) or ()
        states = features(job, taps)[: len(job["tokens"]) - 1]
        if taps:
            states = model.combine_hidden_states(states)
        drafted = DRAFTS[speculative.method](job, model, states)
    return {"unset": unset, "taps": list(taps), "served": served, **drafted}


if __name__ == "__main__":
    main(draft)
