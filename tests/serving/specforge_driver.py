"""Draft one block with the draft models and strict loader of SpecForge itself. Usage: JOBS RESULTS."""

from types import SimpleNamespace

import specforge.modeling.draft  # noqa: F401  Registers the classes by their names.
import torch
from shared import features, fill_with_nan, left_unset, main, masked
from specforge.algorithms.model_providers import resolve_eagle_capture_layers
from specforge.modeling.auto import AutoDraftModel
from specforge.training.model_loading import load_draft_config_source, warm_start_draft_model
from specforge.utils import padding


# Of a run's settings, the one that goes before the folder's taps. Its trainers hold losses in kernels for a GPU, so
# their calls of the draft models are made here, in their order.
UNSET = SimpleNamespace(model=SimpleNamespace(aux_hidden_state_layer_ids=None))


def _block(job, model):
    """A block of DFlash or DSpark behind the text."""
    length, size = len(job["tokens"]), model.block_size
    states = model(
        position_ids=torch.arange(length - 1 + size)[None],
        noise_embedding=job["embedding"][masked(job["tokens"][-1], model.mask_token_id, size)][None],
        target_hidden=features(job, [index + 1 for index in model.target_layer_ids])[None, : length - 1],
    )
    if job["kind"] == "dflash":
        return {"logits": states[0, 1:] @ job["head"].T}
    before = torch.cat([job["tokens"][-1:], job["draft_tokens"][:-1]])[None]
    logits = model.apply_logits_head(states @ job["head"].T, prev_token_ids=before, hidden_states=states)
    confidence = model.predict_confidence(states, prev_token_ids=before)
    return {"logits": logits[0], "confidence": None if confidence is None else confidence[0]}


def _chain(job, model):
    """EAGLE-3 as in its training: each step is told the token before, and sees its own states of earlier steps."""
    place, steps = len(job["tokens"]) - 2, len(job["draft_tokens"])
    ids = torch.cat([job["tokens"], job["draft_tokens"]])[None, 1:]
    taps = resolve_eagle_capture_layers(UNSET, model.config, None)
    known = features(job, [index + 1 for index in taps])[: place + 1]
    states = model.project_hidden_states(torch.cat([known, known.new_zeros(steps, known.shape[1])])[None])
    count = ids.shape[1]
    mask = model.prepare_decoder_attention_mask(torch.ones(1, count, dtype=torch.bool), states, 1, count, 0)
    cache, logits = [[], []], []
    for _ in range(steps):
        embeddings = model.embed_input_ids(ids)
        states = model.backbone(embeddings, states, cache, mask, torch.arange(count)[None])
        logits.append(model.compute_logits(states)[0, place])
        ids = padding(ids, left=False)
    whole = torch.full((steps, model.vocab_size), -torch.inf)
    return {"logits": whole.index_copy(1, torch.arange(model.draft_vocab_size) + model.d2t, torch.stack(logits))}


def draft(job):
    config = load_draft_config_source(job["folder"])
    model = AutoDraftModel.from_config(config).eval()
    fill_with_nan(model)
    chain = job["kind"] == "eagle3"
    warm_start_draft_model(
        model, job["folder"], draft_config=config, strategy=job["kind"], allow_missing_embedding=chain
    )
    if chain:
        model.load_embedding(job["target"])
    return {**(_chain if chain else _block)(job, model), "unset": left_unset(model)}


if __name__ == "__main__":
    main(draft)
