"""vLLM's DSpark in its first model runner, the only one for CPUs; imported inside the engine's environment.

vLLM drafts with DSpark in its second runner alone, which needs Triton. Model, loader, cache, attention and
verification here are vLLM's own, through the path of DFlash, which has the same backbone; the layout of a block and
the loop over its slots are written after its `DSparkSpeculator`. So this says that vLLM's model drafts, and is
verified, as ours, and nothing of the second runner.
"""

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config


class DSparkProposer(DFlashProposer):
    def set_inputs_first_pass(self, *args, **kwargs):
        """One query fewer, and every one of them proposes, where the anchor's slot does too."""
        self.from_anchor = getattr(self.draft_model_config.hf_config, "sample_from_anchor", True)
        self.num_speculative_tokens -= self.from_anchor
        num_tokens, slots, attention = super().set_inputs_first_pass(*args, **kwargs)
        self.num_speculative_tokens += self.from_anchor
        self.anchors = kwargs["next_token_ids"]
        return num_tokens, self.arange[:num_tokens] if self.from_anchor else slots, attention

    def _sample_draft_tokens(self, hidden_states, sampling_metadata):
        logits = self.model.compute_draft_logits(hidden_states).unflatten(0, (-1, self.num_speculative_tokens))
        drafted = [self.anchors]
        for slot in range(self.num_speculative_tokens):
            bias = self.model.markov_bias(self.model.markov_embed(drafted[-1]))
            drafted.append(self.model.map_draft_to_target((logits[:, slot] + bias).argmax(-1)))
        return torch.stack(drafted[1:], dim=1).flatten(), None


def as_dflash(speculation: dict) -> dict:
    """What vLLM is told, so that its first runner takes a DSpark folder."""
    # The name that vLLM makes of the folder's architecture for DFlash.
    ModelRegistry.register_model("DFlashQwen3DSparkModel", Qwen3DSparkForCausalLM)
    gpu_model_runner.DFlashProposer = DSparkProposer
    gpu_model_runner.GPUModelRunner._get_eagle3_aux_layers_from_config = lambda runner: (
        get_eagle3_aux_layers_from_config(runner.speculative_config)
    )
    return {**speculation, "method": "dflash"}
