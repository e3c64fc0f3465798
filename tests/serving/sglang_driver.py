"""Draft one block with SGLang's own config parser, model class and weight loader. Usage: JOBS RESULTS."""

import asyncio
import tempfile
from types import SimpleNamespace

import torch
from shared import CachedAttention, features, fill_with_nan, left_unset, main, masked, stub


_library = stub("tvm_ffi", "uvloop", "vllm")

import uvloop  # noqa: E402


uvloop.EventLoopPolicy = asyncio.DefaultEventLoopPolicy

from sglang.srt.arg_groups import speculative_hook  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.entrypoints.openai.protocol import CompletionRequest  # noqa: E402
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode  # noqa: E402
from sglang.srt.model_executor.model_runner_components import spec_aux_hidden_state  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.model_loader.utils import get_model_architecture  # noqa: E402
from sglang.srt.models import dflash, llama, qwen3  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, get_spec, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config  # noqa: E402
from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402


def _captured(args, target_config):
    """Indices of `hidden_states` that SGLang's Qwen3 target captures for this drafter."""
    algorithm = SpeculativeAlgorithm.from_string(args.speculative_algorithm)
    resolved = spec_aux_hidden_state.resolve_spec_aux_hidden_state_config(
        server_args=args,
        model_config=target_config,
        spec_algorithm=algorithm,
        is_draft_worker=False,
    )
    target = SimpleNamespace(
        pp_group=SimpleNamespace(is_last_rank=True),
        config=target_config.hf_config,
        model=SimpleNamespace(layers_to_capture=[]),
    )
    if algorithm.is_dflash_family():
        qwen3.Qwen3ForCausalLM.set_dflash_layers_to_capture(target, resolved.dflash_target_layer_ids)
    elif algorithm.is_eagle3():
        qwen3.Qwen3ForCausalLM.set_eagle3_layers_to_capture(target, resolved.eagle_aux_hidden_state_layer_ids)
    return target.model.layers_to_capture


class _OnCuda:
    """Settings of a server, which says that it runs on CUDA where it is asked whether speculation can."""

    device = "cuda"

    def __init__(self, settings):
        self.settings = settings

    def __getattr__(self, name):
        return getattr(self.settings, name)


# Kernels, the refusal of block drafters on a CPU, the search for a backend; everything that reads the folder stays
# SGLang's.
dflash.RadixAttention = llama.RadixAttention = qwen3.RadixAttention = CachedAttention
_settings = speculative_hook.resolving_view
speculative_hook.resolving_view = lambda args: _OnCuda(_settings(args))
speculative_hook._resolve_dflash_draft_attention_backend = lambda args: None


def _load(draft_config):
    """The draft model, and the names of its parameters that the folder left unset."""
    model = get_model_architecture(draft_config)[0](draft_config.hf_config)
    fill_with_nan(model)
    loader = DefaultModelLoader(LoadConfig())
    model.load_weights(loader._get_all_weights(draft_config, model))
    return model, left_unset(model)


def _block(model, states, ids, embedding):
    """The draft model's states of a block behind `states`."""
    context, length = model.project_target_hidden(states), len(states)
    for layer in model.layers:
        attention = layer.self_attn
        attention.use_table_qk_norm_rope = False  # A kernel; SGLang's own path beside it computes the same.
        attention.attn.causal = attention.attn_type != AttentionType.ENCODER_ONLY
        keys, values = attention.kv_proj_only(context)
        attention.attn.append(attention.apply_k_rope(torch.arange(length), attention.apply_k_norm(keys)), values)
    embedded = torch.nn.functional.embedding(ids, embedding)
    return model(ids, length + torch.arange(len(ids)), None, embedded).hidden_states


def _dflash(job, model, draft_config, states):
    mask = parse_dflash_draft_config(draft_hf_config=draft_config.hf_config).mask_token_id
    block = get_spec().speculative_num_draft_tokens  # SGLang reads it from the folder.
    hidden = _block(model, states, masked(job["tokens"][-1], mask, block), job["embedding"])
    return {"logits": hidden[1:] @ job["head"].T}


def _dspark(job, model, draft_config, states):
    """As `DraftBlockProposer` and `draft_markov_block` do."""
    runtime = resolve_runtime_config(
        draft_hf_config=draft_config.hf_config,
        speculative_num_draft_tokens=get_spec().speculative_num_draft_tokens,
        target_vocab_size=len(job["head"]),
    )
    embedding = torch.nn.Embedding.from_pretrained(job["embedding"])
    head = ParallelLMHead(*job["head"].shape)
    head.weight.data.copy_(job["head"])
    model.attach_shared_modules(embed_tokens=embedding, lm_head=head)
    first_slot = 0 if model.sample_from_anchor else 1
    ids = masked(job["tokens"][-1], runtime.mask_token_id, runtime.gamma + first_slot)
    hidden = _block(model, states, ids, model.embed_tokens.weight)[first_slot:]
    base, features = model.compute_base_logits(hidden)
    state, previous, logits = model.markov_head.init_state(hidden[:1]), job["tokens"][-1:], []
    for slot in range(runtime.gamma):
        bias, state = model.markov_head.step_bias(previous, hidden_states=hidden[slot : slot + 1], state=state)
        logits.append(base[slot : slot + 1] + bias)
        previous = job["draft_tokens"][slot : slot + 1]
    drafted = {"logits": torch.cat(logits)}
    # By default SGLang builds no confidence head; where verification is cut short by it, it does.
    with envs.SGLANG_RAGGED_VERIFY_MODE.override("compact"):
        try:
            judge, unset = _load(draft_config)
        except ValueError as error:
            return {**drafted, "confidence": str(error)}
    _, logits = judge.compute_confidence(
        anchor_tokens=job["tokens"][-1:], draft_tokens=job["draft_tokens"][None], confidence_features=features
    )
    return {**drafted, "confidence": logits[0], "unset": unset}


def _eagle3(job, model, draft_config, states):
    """From the states of the target, then from its own."""
    tokens, length, proposals = job["tokens"], len(job["tokens"]), len(job["draft_tokens"])
    # What SGLang lends of the target.
    if not model.model.embed_tokens.weight.isfinite().all():
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
        wide = logits.new_full((proposals, len(job["head"])), float("-inf"))
        wide[:, model.hot_token_id] = logits
        logits = wide
    return {"logits": logits}


def _plain(job, model, draft_config, states):
    """A whole language model, which reads the text."""
    ids, positions, logits = job["tokens"], torch.arange(len(job["tokens"])), []
    for slot in range(len(job["draft_tokens"])):
        empty = positions[:0]  # Places in SGLang's cache, which is replaced.
        batch = ForwardBatch(ForwardMode.EXTEND, 1, ids, empty, positions[-1:] + 1, empty, int(positions[-1]) + 1)
        hidden = model.model(ids, positions, batch)
        logits.append(hidden[-1:] @ model.lm_head.weight.T)
        ids, positions = job["draft_tokens"][slot : slot + 1], positions[-1:] + 1
    return {"logits": torch.cat(logits)}


def _answer(job):
    """What SGLang sends, asked with a request of ours, of a text of these accepted runs; in its own words."""
    runs, steps = job["accepted"], SimpleNamespace(spec_correct_drafts_histogram=[])
    for run in runs:
        Req.update_spec_correct_drafts_histogram(steps, run)
    tokens = 1 + sum(run + 1 for run in runs)  # the first comes from the prefill
    counted = {"spec_verify_ct": len(runs), "spec_num_correct_drafts": sum(runs), "completion_tokens": tokens}
    counted |= vars(steps)
    told = {"id": "0", "prompt_tokens": 3, "completion_tokens": tokens, "weight_version": "default"}
    told["finish_reason"] = {"type": "stop", "matched": 2}
    batch = SimpleNamespace(**{name: [value] for name, value in counted.items()})
    TokenizerManager._calculate_spec_decoding_metrics(None, told, batch, 0)
    text = {"text": "a b", "output_ids": list(range(tokens)), "meta_info": told}
    asked = CompletionRequest(**job["asked"])
    return OpenAIServingCompletion._build_completion_response(None, asked, [text], 0).model_dump_json(by_alias=True)


DRAFTS = {"DFLASH": _dflash, "DSPARK": _dspark, "EAGLE3": _eagle3, "STANDALONE": _plain}


def draft(job):
    args = ServerArgs(
        model_path=job["target"],
        speculative_draft_model_path=job["folder"],
        trust_remote_code=job["trust_remote_code"],
        device="cpu",
        dtype=job["dtype"],
        **job["launch"]["sglang"],
    )
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    target_config = ModelConfig.from_server_args(args)
    draft_config = ModelConfig.from_server_args(args, model_path=job["folder"], is_draft_model=True)
    if not torch.distributed.is_initialized():
        with tempfile.NamedTemporaryFile() as store:
            init_distributed_environment(1, 0, f"file://{store.name}", 0, backend="gloo")
            initialize_model_parallel(backend="gloo")
    model, unset = _load(draft_config)
    taps = _captured(args, target_config)
    states = features(job, taps)[: len(job["tokens"]) - 1]
    drafted = DRAFTS[args.speculative_algorithm](job, model, draft_config, states)
    verified = get_spec().speculative_num_draft_tokens
    told = {"verified": verified, "answer": _answer(job)}
    return {"unset": unset, "taps": list(taps), **told, **drafted}


if __name__ == "__main__":
    main(draft)
