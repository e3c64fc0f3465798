"""Draft one block with the model classes and loader of `speculators` itself. Usage: JOBS RESULTS."""

import torch
from shared import features, left_unset, main
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models.dflash import core as dflash
from speculators.models.dspark import core as dspark
from speculators.models.eagle3 import core as eagle3


# The library's forward passes give losses; what these are made of is taken down.
seen = []
for module in (dflash, dspark, eagle3):
    module.compute_metrics = lambda *args, **kwargs: seen.append(args) or (torch.zeros(()), {})


def _inputs(job, taps, tokens, length, width):
    """One text whose tokens and features go on with what was drafted, and with nothing."""
    ids, states = tokens.new_zeros(1, length), torch.zeros(1, length, width * len(taps))
    ids[0, : len(tokens)] = tokens
    known = features(job, taps)[: len(job["tokens"]) - 1]
    states[0, : len(known)] = known
    return {
        "hidden_states": states,
        "input_ids": ids,
        "document_ids": torch.zeros_like(ids),
        "loss_mask": torch.zeros_like(ids),
        "verifier_last_hidden_states": torch.zeros(1, length, width),
    }


def _block(job, model):
    """A block of DFlash or DSpark behind the text; slots that follow a drafted token are told it."""
    anchor, size = len(job["tokens"]) - 1, model.block_size
    first = 0 if model.config.sample_from_anchor else 1
    tokens = torch.cat([job["tokens"], job["draft_tokens"]])[: anchor + size]
    inputs = _inputs(job, model.target_layer_ids, tokens, anchor + 1 + size, model.fc.out_features)
    inputs["loss_mask"][0, anchor] = 1
    model(**inputs, max_anchors=1)
    logits, *others = seen[-1]
    confidence = others[1] if len(others) > 3 else None  # DSpark's call has one argument more
    return {"logits": logits[0, first:], "confidence": None if confidence is None else confidence[0, first:]}


def _chain(job, model):
    """EAGLE-3: in training each step is told the token before, as drafting is."""
    place, steps = len(job["tokens"]) - 2, len(job["draft_tokens"])
    tokens = torch.cat([job["tokens"], job["draft_tokens"]])[1:]
    inputs = _inputs(job, model.target_layer_ids, tokens, len(tokens), model.fc.out_features)
    model(**inputs, ttt_steps=steps)
    return {"logits": torch.stack([args[0][0, place] for args in seen[-steps:]])}


def draft(job):
    config = SpeculatorModelConfig.from_pretrained(job["folder"])
    config.speculators_config.verifier.name_or_path = job["target"]
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(job["folder"], config=config).eval()
    model.load_verifier_weights()
    drafted = (_chain if job["kind"] == "eagle3" else _block)(job, model)
    if model.use_draft_vocab:
        logits = drafted["logits"]
        ids = torch.arange(model.draft_vocab_size) + model.d2t
        whole = logits.new_full((len(logits), model.verifier_vocab_size), -torch.inf)
        drafted["logits"] = whole.index_copy(1, ids, logits)
    return {**drafted, "unset": left_unset(model)}


if __name__ == "__main__":
    main(draft)
