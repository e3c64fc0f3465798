"""Which families of causal LMs of transformers can be targets, and for what: each built tiny and at random, and tried.

    python examples/families.py
    python examples/families.py --families qwen3_5_text mamba2

Ends with a table, `families.md`, what it comes from, `families.json`, what the package tells of it, `known.json` (it
becomes `draft_opd_trl/folders/known_families.json`), and one JSON line.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedConfig,
    logging,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draft_opd_trl import SpeculationSettings, Target, create_drafter, speculate
from draft_opd_trl.core.errors import UserError
from draft_opd_trl.core.files import write_atomically
from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.target_shape import text_config
from draft_opd_trl.decoding.replay import replay_text
from draft_opd_trl.evaluation.by_replay import measure_by_replay
from draft_opd_trl.evaluation.measure import measure_acceptance
from draft_opd_trl.folders.target_folder import read_target


LAYERS, VOCAB = 4, 64
# A config that cannot be made smaller than this is not tried.
MOST_PARAMETERS = 20_000_000
# What makes a model tiny, by the names that families use.
SIZES: dict[str, Any] = {
    **dict.fromkeys("hidden_size d_model n_embd dim lru_width word_embed_proj_dim embedding_size".split(), 32),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers".split(), LAYERS),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads linear_num_value_heads linear_num_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads linear_num_key_heads index_n_heads".split(), 2),
    **dict.fromkeys("intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim".split(), 48),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 16),
    **dict.fromkeys(
        "head_dim v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim".split(), 8
    ),
    **dict.fromkeys("mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim".split(), 8),
    **dict.fromkeys("mamba_d_state state_size ssm_state_size".split(), 8),
    **dict.fromkeys("n_groups mamba_n_groups mamba_ngroups n_mamba_heads n_shared_experts".split(), 1),
    **dict.fromkeys("n_group topk_group first_k_dense_replace".split(), 1),
    **dict.fromkeys("num_experts n_routed_experts num_local_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k num_experts_per_token".split(), 2),
    **dict.fromkeys("q_lora_rank kv_lora_rank".split(), 16),
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim rotary_dim time_step_rank".split(), 4),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), VOCAB),
    **dict.fromkeys("max_position_embeddings n_positions".split(), 128),
    **dict.fromkeys("sliding_window attention_chunk_size".split(), 6),
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "index_topk": 64,
    "unpadded_vocab_size": VOCAB,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Families that may be encoders are asked as decoders.
    "is_decoder": True,
}
# What stays unset where a family leaves it unset.
OPTIONAL = {"sliding_window", "q_lora_rank", "rotary_dim", "hidden_size_per_layer_input", "n_inner"}
# Where sizes hang together in a family's own way.
PARTICULAR: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64},
    # Heads are rounded up to 64 together; its kernels compute in bfloat16 unless told otherwise.
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "num_blocks": LAYERS,
        "qk_dim_factor": 1.0,
        "autocast_kernel_dtype": "float32",
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 2},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 64,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3],
    },
    "longcat_flash": {"qk_head_dim": 8, "zero_expert_num": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen4_exp_text": {
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
}
# Where what is derived from sizes cannot be set afterwards: sizes that are given at the start, beside those above.
GIVEN: dict[str, dict[str, Any]] = {
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "shared_experts_intermediate_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 8,
        "swa_qk_nope_head_dim": 4,
        "swa_v_head_dim": 8,
    },
}
# How a target is refused that reads both ways, whatever its class is called: it is no causal language model.
BOTH_WAYS = "no decoder that reads from left to right"
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "attn_types", "no_rope_layers")


@dataclass
class FamiliesArguments:
    """Which."""

    families: list[str] = field(
        default_factory=list, metadata={"help": "Model types, tried anew; by default all not tried yet."}
    )
    output_dir: str = field(default="outputs/families", metadata={"help": "Where the table goes; resumed if there."})


def tiny_config(family: str) -> PreTrainedConfig:
    """A family's own default config, made small: every sort of layer that it has, once or more."""
    if family in GIVEN:
        known = {name: value for name, value in SIZES.items() if hasattr(CONFIG_MAPPING[family], name)}
        return AutoConfig.for_model(family, **{**known, **GIVEN[family]})
    config = AutoConfig.for_model(family)
    for part in (config, text_config(config)):
        _shrink(part)
    return config


def _shrink(config: PreTrainedConfig) -> None:
    for name in PER_LAYER:
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and kinds:
            kinds = list(dict.fromkeys(kinds))
            _set(config, name, [kinds[layer % len(kinds)] for layer in range(LAYERS)])
    for name, value in SIZES.items():
        try:
            before = getattr(config, name)
        except Exception:  # not there, or another one in each layer
            continue
        if before is None and name in OPTIONAL:
            continue
        _set(config, name, [value] * LAYERS if isinstance(before, list) and name != "eos_token_id" else value)
    for name, value in PARTICULAR.get(config.model_type, {}).items():
        _set(config, name, value)
    if "kv_lora_rank" in vars(config):
        _set(config, "head_dim", SIZES["qk_rope_head_dim"])
        _set(config, "num_key_value_heads", SIZES["num_attention_heads"])


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    # Some are computed from others, and cannot be set.
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return


def tiny_target(family: str) -> Target:
    """A seeded random model of a family, as a target."""
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    except UserError:
        raise
    except Exception as error:  # sizes that do not go together, or a model that transformers cannot make
        raise ValueError(f"not made tiny: {type(error).__name__}: {error}") from error
    if size > MOST_PARAMETERS:
        raise ValueError(f"not made tiny: {size:,} parameters")
    torch.manual_seed(0)
    return Target(AutoModelForCausalLM.from_config(config).float().eval())


def try_family(family: str) -> dict[str, Any]:
    """What works: each use's own word for it, or what went wrong, in a line."""
    found: dict[str, Any] = {
        "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family],
        "transformers": transformers.__version__,
    }
    # Neither encoder-decoders, nor encoders asked as decoders, nor models of which the language model is a part.
    config = CONFIG_MAPPING[family]
    parts = set(config.sub_configs) - {"attn_config"}  # MPT's, of its attention
    other = getattr(config, "is_encoder_decoder", False) or parts or hasattr(config, "is_decoder")
    found["decoder_only"] = not other
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [5, 9]]
    settings = SpeculationSettings(8, [2], batch_size=3)
    seeds = range(len(prompts))

    def attempt(use: str, trial: Callable[[], Any]) -> Any:
        try:
            outcome = trial()
        except Exception as error:  # whatever a library does
            said = re.sub(rf"{tempfile.gettempdir()}/\w+", "FOLDER", " ".join(str(error).split()))
            found[use] = f"{type(error).__name__}: {said[: 400 if isinstance(error, UserError) else 160]}"
            return None
        found[use] = outcome if isinstance(outcome, str) else True
        return outcome

    target = attempt("target", lambda: tiny_target(family))
    if target is None:
        found["decoder_only"] &= BOTH_WAYS not in found["target"]
        return found
    found["no_places"] = target.no_places
    found["reads_anew"] = target.reads_anew
    options = {"block_size": 4, "num_hidden_layers": 1, "mask_token_id": VOCAB - 1}
    drafter = attempt("init_dflash", lambda: create_drafter("dflash", target, **options).eval())
    attempt("init_eagle3", lambda: create_drafter("eagle3", target, num_draft_tokens=3))
    if drafter is None:
        return found

    def write() -> Rollout:
        """Its own texts are its argmax along the text, however it decodes."""
        rollout = speculate(target, None, prompts, settings, seeds=seeds)
        said = target.logits(target.forward_text(rollout.tokens, ())[1]).argmax(-1)
        for row, (start, end) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
            assert torch.equal(said[row, start - 1 : end - 1], rollout.tokens[row, start:end]), "not its argmax"
        return rollout

    def replay() -> None:
        features, _ = target.forward_text(texts.tokens, drafter.target_layer_ids)
        assert len(replay_text(drafter, texts, features))

    def speculation() -> str:
        rollout = speculate(target, drafter, prompts, settings, seeds=seeds)
        pairs = zip(rollout.completions(), texts.completions(), strict=True)
        return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(prompts)}"

    def by_replay() -> None:
        ours, theirs = (
            measure(target, drafter, prompts, settings, seeds=seeds)
            for measure in (measure_by_replay, measure_acceptance)
        )
        assert ours.accepted == theirs.accepted, "other counts"

    def rejected() -> None:
        rollout = speculate(target, drafter, prompts, settings, seeds=seeds)
        cache = target.new_cache(*rollout.tokens.shape)
        target.forward_text(rollout.tokens, (), cache)
        scored = target.score_blocks(rollout.tokens, rollout.blocks, cache)
        block = int(rollout.blocks.has_error.nonzero()[0])
        anchor, drafted = int(rollout.blocks.anchors[block]), rollout.blocks.draft_tokens[block]
        text = torch.cat([rollout.tokens[rollout.blocks.texts[block], : anchor + 1], drafted])[None]
        slot = int(rollout.blocks.num_accepted[block]) + 1
        if slot < len(drafted):
            expected = target.forward_text(text, ())[1][0, anchor + slot]
            torch.testing.assert_close(scored[block, slot], expected, rtol=1e-3, atol=1e-3)

    def decoded(target: Target) -> str:
        """Texts of a target that is not the one above, with the drafter's help and without."""
        rollout, plain = (speculate(target, one, prompts, settings, seeds=seeds) for one in (drafter, None))
        pairs = zip(rollout.completions(), plain.completions(), strict=True)
        return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(prompts)}"

    def lora() -> str:
        """The folder of an adapter: read with the adapter in its weights."""
        # PEFT refuses these two of Mamba.
        options = {"r": 2, "target_modules": "all-linear", "exclude_modules": ["out_proj", "conv1d"]}
        torch.manual_seed(0)
        adapted = get_peft_model(
            copy.deepcopy(target.model), LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
        )
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            # Its base, whose folder this has not got.
            base = copy.deepcopy(target.model), {"missing_keys": []}
            file = Path(folder) / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": family}))
            read = Target(read_target(folder, lambda *name, **options: base))
        merged = Target(adapted.merge_and_unload())
        theirs, ours = (speculate(one, None, prompts, settings, seeds=seeds).completions() for one in (merged, read))
        assert theirs == ours, "other texts than its merged weights"
        assert ours != texts.completions(), "an adapter without effect"
        return decoded(read)

    def quantised() -> str:
        """Eight bits a weight, by bitsandbytes."""
        # By default it treats a column as large where any text of a batch has it large.
        options = {
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
            "dtype": torch.float32,
            "config": copy.deepcopy(target.model.config),
        }
        with tempfile.TemporaryDirectory() as folder:
            target.model.save_pretrained(folder)
            model = read_target(folder, AutoModelForCausalLM.from_pretrained, **options)
        return decoded(Target(model.eval()))

    texts = attempt("texts", write)
    if texts is not None:
        attempt("replay", replay)
        attempt("speculation", speculation)
        attempt("evaluation by replay", by_replay)
        attempt("rejected stream", rejected)
        attempt("LoRA", lora)
        attempt("quantised", quantised)
    return found


def works(found: dict[str, Any], use: str) -> bool:
    """Whether a use is without fault: of speculation, every text the target's own."""
    outcome = found.get(use)
    return outcome is True or outcome == "4 of 4"


USES = ("texts", "replay", "evaluation by replay", "speculation", "rejected stream", "init_dflash", "init_eagle3")
USES += ("LoRA", "quantised")


def table(families: dict[str, dict[str, Any]]) -> str:
    """A row a family."""
    lines = [f"| family | {' | '.join(USES)} | each round reads |", "|---" * (len(USES) + 2) + "|"]
    for family, found in families.items():
        if not found["decoder_only"]:
            continue
        cells = ["✓" if works(found, use) else "–" for use in USES]
        lines.append(f"| `{family}` | {' | '.join(cells)} | {_reads(found)} |")
    return "\n".join(lines)


def _reads(found: dict[str, Any]) -> str:
    """What a round of speculation reads."""
    if found["target"] is not True:
        return ""
    if found["no_places"] is None:
        return "the block"
    return "the run and the block" if found["reads_anew"] is None else "the whole text"


def known(families: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the package tells of them (`draft_opd_trl.folders.known_families`)."""
    (version,) = {found["transformers"] for found in families.values()}
    good = {family: found for family, found in families.items() if found["target"] is True and "texts" in found}
    reads: dict[str, list[str]] = {}
    for family, found in good.items():
        reads.setdefault(_reads(found), []).append(family)
    lacks = {
        family: {use: found.get(use, "not tried") for use in USES if not works(found, use)}
        for family, found in good.items()
    }
    refused = {
        family: found["target"].split(": ", 1)[1]
        for family, found in families.items()
        if str(found["target"]).startswith("InputError")
    }
    return {
        "transformers": version,
        "reads": {name: " ".join(of) for name, of in reads.items()},
        "lacks": {family: uses for family, uses in lacks.items() if uses},
        "refused": refused,
    }


def main(args: FamiliesArguments) -> None:
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    folder = Path(args.output_dir)
    results = folder / "families.json"
    families = json.loads(results.read_text()) if results.is_file() else {}
    wanted = args.families or [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in families]
    with tqdm(wanted, unit="family") as bar:
        for family in bar:
            bar.set_postfix_str(family)
            families[family] = try_family(family)
            write_atomically(results, json.dumps(families, indent=1))
    families = {family: families[family] for family in sorted(families)}
    write_atomically(results, json.dumps(families, indent=1))
    write_atomically(folder / "families.md", table(families) + "\n")
    write_atomically(folder / "known.json", json.dumps(known(families), indent=1) + "\n")
    counted = [found for found in families.values() if found["decoder_only"]]
    print(table(families))
    shares = {use: round(sum(works(found, use) for found in counted) / len(counted), 3) for use in USES}
    print(json.dumps({"families": len(counted), **shares}))


if __name__ == "__main__":
    main(*HfArgumentParser(FamiliesArguments).parse_args_into_dataclasses())
