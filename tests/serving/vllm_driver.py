"""Draft one block with vLLM's own config parser, model class and weight loader. Usage: JOBS RESULTS."""

import tempfile

import torch
from shared import CachedAttention, features, fill_with_nan, left_unset, main, stub


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
from vllm.model_executor.models import llama, qwen3_dflash, registry  # noqa: E402
from vllm.transformers_utils.config import maybe_override_with_speculators  # noqa: E402
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config  # noqa: E402


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
llama.Attention = qwen3_dflash.Attention = CachedAttention
registry._run_in_subprocess = lambda function: function()


def draft(job):
    dflash, length = job["kind"] == "dflash", len(job["tokens"])
    trust = job["trust_remote_code"]
    # What `vllm serve FOLDER` makes of the folder: of a flat one nothing.
    served = maybe_override_with_speculators(job["folder"], job["folder"], trust, None, None)
    target_config = ModelConfig(
        model=job["target"], tokenizer=job["target"], dtype=job["dtype"], trust_remote_code=trust
    )
    parallel = ParallelConfig()
    speculative = SpeculativeConfig(
        method=job["kind"],
        model=job["folder"],
        num_speculative_tokens=len(job["draft_tokens"]),
        target_model_config=target_config,
        target_parallel_config=parallel,
    )
    config = VllmConfig(
        model_config=target_config,
        speculative_config=speculative,
        parallel_config=parallel,
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(mode=0, custom_ops=["none"]),
    )
    draft_config = speculative.draft_model_config
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
        taps = get_eagle3_aux_layers_from_config(speculative)
        states = model.combine_hidden_states(features(job, taps)[: length - 1])
        tokens, block = job["tokens"], len(job["draft_tokens"]) + 1
        if dflash:
            for layer, causal in zip(model.model.layers, model.get_draft_attn_causal(), strict=True):
                layer.self_attn.attn.causal = causal
            model.precompute_and_store_context_kv(states, torch.arange(length - 1), torch.arange(length - 1))
            ids = torch.full((block,), draft_config.hf_config.dflash_config["mask_token_id"])
            ids[0] = tokens[-1]
            logits = model.compute_logits(model(ids, length - 1 + torch.arange(block))[1:])
        else:
            hidden, fed_back = model(tokens[1:], torch.arange(length - 1), states)
            logits = [model.compute_logits(hidden[-1:])]
            for slot in range(1, len(job["draft_tokens"])):
                token = job["draft_tokens"][slot - 1 : slot]
                hidden, fed_back = model(token, torch.tensor([length - 2 + slot]), fed_back[-1:])
                logits.append(model.compute_logits(hidden))
            logits = torch.cat(logits)
    return {"unset": unset, "taps": list(taps), "logits": logits, "served": served}


if __name__ == "__main__":
    main(draft)
