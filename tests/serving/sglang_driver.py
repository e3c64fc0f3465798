"""Draft one block with SGLang's own config parser, model class and weight loader. Usage: JOBS RESULTS."""

import tempfile
from types import SimpleNamespace

import torch
from shared import CachedAttention, features, fill_with_nan, left_unset, main, stub


_library = stub("tvm_ffi", "vllm")

from sglang.srt.arg_groups import speculative_hook  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.model_executor.model_runner_components import spec_aux_hidden_state  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.model_loader.utils import get_model_architecture  # noqa: E402
from sglang.srt.models import dflash, llama, qwen3  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, get_spec, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402


def _captured(args, target_config):
    """Indices of `hidden_states` that SGLang's Qwen3 target captures for this drafter."""
    resolved = spec_aux_hidden_state.resolve_spec_aux_hidden_state_config(
        server_args=args,
        model_config=target_config,
        spec_algorithm=SpeculativeAlgorithm.from_string(args.speculative_algorithm),
        is_draft_worker=False,
    )
    target = SimpleNamespace(
        pp_group=SimpleNamespace(is_last_rank=True), config=target_config.hf_config, model=SimpleNamespace()
    )
    if args.speculative_algorithm == "DFLASH":
        qwen3.Qwen3ForCausalLM.set_dflash_layers_to_capture(target, resolved.dflash_target_layer_ids)
    else:
        qwen3.Qwen3ForCausalLM.set_eagle3_layers_to_capture(target, resolved.eagle_aux_hidden_state_layer_ids)
    return target.model.layers_to_capture


# Kernels, the refusal of DFlash on a CPU, the search for a backend; everything that reads the folder stays SGLang's.
dflash.RadixAttention = llama.RadixAttention = CachedAttention
speculative_hook.current_platform = SimpleNamespace(
    is_out_of_tree=lambda: True, supports_speculative_algorithm=lambda algorithm: True
)
speculative_hook._resolve_dflash_draft_attention_backend = lambda args: None


def draft(job):
    is_dflash, length = job["kind"] == "dflash", len(job["tokens"])
    proposals = len(job["draft_tokens"])
    options = {"speculative_num_steps": proposals, "speculative_eagle_topk": 1}
    options["speculative_num_draft_tokens"] = proposals + 1
    args = ServerArgs(
        model_path=job["target"],
        speculative_algorithm=job["kind"].upper(),
        speculative_draft_model_path=job["folder"],
        trust_remote_code=job["trust_remote_code"],
        device="cpu",
        dtype=job["dtype"],
        **({} if is_dflash else options),
    )
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    target_config = ModelConfig.from_server_args(args)
    draft_config = ModelConfig.from_server_args(args, model_path=job["folder"], is_draft_model=True)
    if not torch.distributed.is_initialized():
        with tempfile.NamedTemporaryFile() as store:
            init_distributed_environment(1, 0, f"file://{store.name}", 0, backend="gloo")
            initialize_model_parallel(backend="gloo")
    model = get_model_architecture(draft_config)[0](draft_config.hf_config)
    fill_with_nan(model)
    loader = DefaultModelLoader(LoadConfig())
    model.load_weights(loader._get_all_weights(draft_config, model))
    unset = left_unset(model)

    taps = _captured(args, target_config)
    states = features(job, taps)[: length - 1]
    tokens = job["tokens"]
    if is_dflash:
        config = parse_dflash_draft_config(draft_hf_config=draft_config.hf_config)
        context, positions = model.project_target_hidden(states), torch.arange(length - 1)
        for layer in model.layers:
            attention = layer.self_attn
            attention.use_table_qk_norm_rope = False  # A kernel; SGLang's own path beside it computes the same.
            attention.attn.causal = attention.attn_type != AttentionType.ENCODER_ONLY
            keys, values = attention.kv_proj_only(context)
            attention.attn.append(attention.apply_k_rope(positions, attention.apply_k_norm(keys)), values)
        ids = torch.full((proposals + 1,), config.mask_token_id)
        ids[0] = tokens[-1]
        embedded = torch.nn.functional.embedding(ids, job["embedding"])
        hidden = model(ids, length - 1 + torch.arange(proposals + 1), None, embedded).hidden_states
        block = get_spec().speculative_num_draft_tokens  # SGLang reads it from the folder.
        return {"unset": unset, "taps": taps, "logits": hidden[1:] @ job["head"].T, "block_size": block}

    # What SGLang lends of the target.
    if "model.embed_tokens.weight" in unset:
        model.model.embed_tokens.weight.data.copy_(job["embedding"])
    ids, positions, logits = tokens[1:], torch.arange(length - 1), []
    for slot in range(proposals):
        batch = SimpleNamespace(mm_input_embeds=None, spec_info=SimpleNamespace(hidden_states=states))
        embedded = model.model.embed_tokens(ids)
        hidden, fed_back = model.model(ids, positions, batch, embedded)
        logits.append(hidden[-1:] @ model.lm_head.weight.T)
        states = fed_back[0][-1:]
        ids, positions = job["draft_tokens"][slot : slot + 1], torch.tensor([length - 1 + slot])
    logits = torch.cat(logits)
    if model.hot_token_id is not None:
        wide = logits.new_full((proposals, target_config.vocab_size), float("-inf"))
        wide[:, model.hot_token_id] = logits
        logits = wide
    return {"unset": unset, "taps": taps, "logits": logits}


if __name__ == "__main__":
    main(draft)
