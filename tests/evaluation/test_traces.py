"""Traces against hand-made decoding, against a slow recount, and token by token against the tokenizer's own text."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import VOCAB, random_prompts, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.sampling import probabilities
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.replay import text_blocks
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation.traces import Trace, TraceBlock, token_reader, trace_texts


def number_tokenizer():
    """Token i reads "<i>"."""
    vocabulary = {f"<{i}>": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "a": VOCAB}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def names(tokens):
    return [f"<{token}>" for token in tokens]


class Forced:
    """A chooser that makes a drafter propose given tokens, and keeps the distribution it had for each."""

    def __init__(self, draft_ids, sampling):
        self.rest, self.sampling, self.seen = draft_ids, sampling, []

    def __call__(self, logits):
        # EAGLE-3 asks slot by slot, `(1, 1, DV)`; DFlash for all at once, `(1, 1, K, DV)`.
        count = logits[..., 0].numel()
        ids, self.rest = self.rest[:count], self.rest[count:]
        probs = probabilities(logits, self.sampling)
        self.seen.extend(probs.reshape(count, -1))
        return ids.reshape(logits.shape[:-1]), probs


def slow_probabilities(target, drafter, tokens, anchor, drafts, sampling):
    """Distributions `(K, V)` of target and drafter at one block: plain forwards, and the cached way of proposing."""
    text = tokens[: anchor + 1]
    by_target = []
    for slot in range(len(drafts)):
        prefix = torch.cat([text, drafts[:slot]])[None]
        by_target.append(probabilities(target.model(input_ids=prefix).logits[0, -1], sampling))
    features, _ = target.forward_text(text[None], drafter.target_layer_ids)
    state = drafter.start(1, len(text) + len(drafts))
    drafter.extend(state, features, torch.arange(len(text))[None], text[None])
    vocab_map = torch.arange(VOCAB) if drafter.vocab_map is None else drafter.vocab_map
    choose = Forced((vocab_map[None] == drafts[:, None]).long().argmax(1), sampling)
    drafter.propose(state, text[None, -1:], torch.tensor([[anchor]]), len(text), choose)
    by_drafter = torch.zeros(len(drafts), VOCAB).index_copy(1, vocab_map, torch.stack(choose.seen))
    return torch.stack(by_target), by_drafter


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.7, top_k=20)], ids=["greedy", "sampled"])
def test_traces_equal_a_slow_recount(target, drafter, sampling):
    prompts = random_prompts(3)
    settings = SpeculationSettings(14, [], sampling)
    rollout = speculate(target, drafter, prompts, settings, torch.Generator().manual_seed(0))
    traces = trace_texts(target, drafter, rollout, number_tokenizer(), sampling, batch_size=2)
    law = sampling if sampling.temperature else SamplingParams(1.0)
    blocks = rollout.blocks
    assert blocks.has_error.any() and (blocks.num_accepted > 0).any()
    assert [len(trace.blocks) for trace in traces] == torch.bincount(blocks.texts, minlength=3).tolist()
    for row, (prompt, trace) in enumerate(zip(prompts, traces, strict=True)):
        text = rollout.tokens[row, : rollout.lengths[row]]
        completion = text[len(prompt) :].tolist()
        assert trace.prompt == "".join(names(prompt)) and trace.first == f"<{completion[0]}>"
        assert trace.completion == "".join(names(completion))
        own = blocks.select(blocks.texts == row)
        for index, block in enumerate(trace.blocks):
            anchor, accepted, valid = (int(x[index]) for x in (own.anchors, own.num_accepted, own.num_valid))
            drafts = own.draft_tokens[index]
            by_target, by_drafter = slow_probabilities(target, drafter, text, anchor, drafts, law)
            choices = text[anchor + 1 + accepted : anchor + 2 + accepted] if accepted < valid else text[:0]
            choices = torch.cat([choices, by_target[accepted + 1 : valid].argmax(-1)]) if accepted < valid else choices
            slots = torch.arange(valid)
            assert block.position == anchor - len(prompt) + 1
            assert block.num_accepted == accepted
            assert block.drafts == names(drafts[:valid].tolist())
            assert block.choices == names(choices.tolist())
            wrong = torch.arange(accepted, valid)
            for given, dense, at, tokens in (
                (block.draft_probs, by_drafter, slots, drafts[:valid]),
                (block.target_probs, by_target, slots, drafts[:valid]),
                (block.choice_draft_probs, by_drafter, wrong, choices),
                (block.choice_target_probs, by_target, wrong, choices),
            ):
                assert given == pytest.approx(dense[at, tokens].tolist(), abs=2e-5)
            assert (block.bonus is None) == (accepted < valid or block.position + valid == len(completion))


def test_a_bonus_token_follows_a_whole_block_only(qwen_target, qwen_drafter):
    assert qwen_drafter.num_draft_tokens == 4
    rollout = Rollout.from_ids([[3]], [[11, 12, 13, 14, 15, 16, 17]])
    rollout.blocks = text_blocks(rollout, torch.tensor([0, 0, 0]), torch.tensor([1, 3, 6]), 4)
    blocks = trace_texts(qwen_target, qwen_drafter, rollout, number_tokenizer())[0].blocks
    # The second ends with the text, and so does the third, whose last proposals lie behind it.
    assert [block.bonus for block in blocks] == ["<16>", None, None]
    assert [block.drafts for block in blocks] == [names([12, 13, 14, 15]), names([14, 15, 16, 17]), names([17])]
    assert [block.choices for block in blocks] == [[], [], []]


def test_texts_without_blocks_are_replayed(qwen_target, qwen_drafter):
    rollout = speculate(qwen_target, qwen_drafter, random_prompts(3), SpeculationSettings(20, []))
    bare = Rollout(rollout.tokens, rollout.prompt_lengths, rollout.lengths)
    given, replayed = (trace_texts(qwen_target, qwen_drafter, texts, number_tokenizer()) for texts in (rollout, bare))
    assert given == replayed
    assert [Trace.from_dict(json.loads(json.dumps(asdict(trace)))) for trace in given] == given


def test_a_text_of_one_token_has_no_block(qwen_target, qwen_drafter):
    trace = trace_texts(qwen_target, qwen_drafter, Rollout.from_ids([[3, 4]], [[7]]), number_tokenizer())[0]
    assert trace == Trace("<3><4>", "<7>", [])
    assert trace.acceptance_length == 0


def test_acceptance_length_by_hand():
    rejected = TraceBlock(1, ["b", "x"], [0.5, 0.5], [0.5, 0.1], 1, ["c"], [0.2], [0.8], None)
    bonus = TraceBlock(3, ["d", "e"], [0.5, 0.5], [0.5, 0.5], 2, [], [], [], "f")
    cut = TraceBlock(6, ["g"], [0.5], [0.5], 1, [], [], [], None)
    trace = Trace("?", "a", [rejected, bonus, cut])
    assert [block.committed for block in trace.blocks] == [["b", "c"], ["d", "e", "f"], ["g"]]
    assert trace.completion == "abcdefg"
    assert trace.acceptance_length == 2


def byte_tokenizer():
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_that_are_no_character_are_spelled_out():
    tokenizer = byte_tokenizer()
    read = token_reader(tokenizer)
    ids = tokenizer("a <é\n")["input_ids"]
    assert [read(token) for token in ids] == ["a", " ", "<", "\\xc3", "\\xa9", "\n"]


def test_sentencepiece_tokens_keep_their_space_and_spell_their_bytes():
    vocabulary = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, "<0xE2>": 4, "<0x0A>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    read = token_reader(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert [read(token) for token in (2, 3, 4, 5)] == [" b", "c", "\\xe2", "\n"]


def test_special_tokens_are_shown():
    assert token_reader(tiny_tokenizer())(0) == "<|end|>"


def test_a_token_the_drafter_cannot_say_has_no_probability(qwen_target, qwen_drafter):
    rollout = speculate(qwen_target, qwen_drafter, random_prompts(4), SpeculationSettings(40, []))
    vocab_map = qwen_drafter.vocab_map
    outside = set() if vocab_map is None else set(names(set(range(VOCAB)) - set(vocab_map.tolist())))
    traces = trace_texts(qwen_target, qwen_drafter, rollout, number_tokenizer())
    blocks = [block for trace in traces for block in trace.blocks]
    given = [p for b in blocks for token, p in zip(b.choices, b.choice_draft_probs, strict=True) if token in outside]
    assert set(given) == ({0.0} if outside else set())
