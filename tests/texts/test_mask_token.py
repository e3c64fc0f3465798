"""The token that stands for a slot: what is picked of vocabularies as they are published, and what is refused."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from draft_opd_trl.texts.mask_token import MaskToken, MaskTokens


WORDS = ["one", "two", "three"]


def tokenizer_of(special, bytes_too=False, template="<user>{{ messages }}", **roles):
    """Words, then special tokens; `roles` give some of them something to do."""
    vocabulary = {token: index for index, token in enumerate(WORDS)}
    if bytes_too:
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    if "unk_token" in roles:
        vocabulary[roles["unk_token"]] = len(vocabulary)
    unk = roles.get("unk_token", "one")
    # BPE, as it knows how to fall back to bytes.
    core = Tokenizer(models.BPE(vocabulary, [], unk_token=unk, byte_fallback=bytes_too, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    made.chat_template = template
    return made


def tokens_of(special, rows=None, texts=(), generation=None, config=None, **options):
    tokenizer = tokenizer_of(special, **options)
    fields = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **(config or {})}
    made = Qwen3Config(vocab_size=rows or len(tokenizer), **fields)
    return tokenizer, MaskTokens(tokenizer, made, generation and GenerationConfig(**generation), texts)


RESERVED = ["<end>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]


@pytest.mark.parametrize(
    ("special", "options", "picked", "why"),
    [
        (["<end>", "<hole>", *RESERVED], {"mask_token": "<hole>", "eos_token": "<end>"}, "<hole>", "own mask token"),
        ([*RESERVED, "[MASK]"], {"eos_token": "<end>"}, "[MASK]", "by its name"),
        # The last of them, also where a row is free.
        (RESERVED, {"eos_token": "<end>", "rows": 64}, RESERVED[-1], "reserved, by its name"),
        (["<end>", "<unused0>", "<unused1>"], {"eos_token": "<end>"}, "<unused1>", "reserved, by its name"),
        (["<end>", "[control_8]"], {"eos_token": "<end>"}, "[control_8]", "reserved, by its name"),
        (["<end>", "<｜place▁holder▁no▁7｜>"], {"eos_token": "<end>"}, "<｜place▁holder▁no▁7｜>", "reserved"),
        (["<end>"], {"eos_token": "<end>", "rows": 64}, None, "none of the 4 tokens has"),
        # <user> is the template's.
        (["<end>", "<gh_stars>", "<user>"], {"eos_token": "<end>"}, "<gh_stars>", "neither the chat template"),
        (["<end>"], {"eos_token": "<end>", "unk_token": "<unk>", "bytes_too": True}, "<unk>", "never writes"),
    ],
)
def test_the_best_there_is_is_picked(special, options, picked, why):
    tokenizer, tokens = tokens_of(special, **options)
    chosen = tokens.choose()
    assert chosen.token == picked and why in chosen.why
    assert chosen.id == (len(tokenizer) if picked is None else tokenizer.convert_tokens_to_ids(picked))


def test_what_texts_hold_or_a_config_names_is_passed_over():
    tokenizer, tokens = tokens_of(RESERVED, eos_token="<end>")
    last = tokens.choose().id
    _, tokens = tokens_of(RESERVED, eos_token="<end>", texts=[[0, 1], [last]])
    assert tokens.choose().token == RESERVED[-2]
    _, tokens = tokens_of(RESERVED, eos_token="<end>", generation={"eos_token_id": [3, last]})
    assert tokens.choose().token == RESERVED[-2]
    _, tokens = tokens_of(RESERVED, eos_token="<end>", config={"image_token_id": last})
    assert tokens.choose().token == RESERVED[-2]


def test_none_is_told_with_what_to_do():
    # Without bytes the unknown token is written for whatever is not known.
    for options in ({}, {"unk_token": "<unk>"}):
        _, tokens = tokens_of(["<end>"], eos_token="<end>", **options)
        with pytest.raises(
            ValueError, match="None of the target's . tokens can stand for a slot.*kind of drafter that"
        ):
            tokens.choose()


def test_one_that_is_given_is_taken_by_id_and_by_text():
    tokenizer, tokens = tokens_of(RESERVED, rows=64, eos_token="<end>")
    first = tokenizer.convert_tokens_to_ids(RESERVED[1])
    assert tokens.choose(RESERVED[1]) == tokens.choose(first) == MaskToken(first, RESERVED[1], "as given")
    assert tokens.choose(63) == MaskToken(63, None, "as given")


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (64, "has the rows 0 … 63"),
        (-1, "has the rows 0 … 63"),
        ("<end>", "it is the target's eos_token_id"),
        ("<start>", "it is the target's bos_token_id"),
        ("<pad>", "it is the target's pad_token_id"),
        ("<turn>", "it is the target's eos_token_id"),
        ("<user>", "the chat template writes <user>"),
        ("<unused0>", "it occurs in the prompts"),
        ("two", "'two' is a token of ordinary text"),
        ("<unusd1>", "is no token of the target's tokenizer. Did you mean <unused1>?"),
        (True, "`mask_token_id` is True, of type bool"),
        ([5], "`mask_token_id` is [5], of type list"),
    ],
)
def test_what_cannot_stand_for_a_slot_is_refused(wanted, why):
    special = ["<end>", "<start>", "<pad>", "<turn>", "<user>", "<unused0>", "<unused1>"]
    roles = {"eos_token": "<end>", "bos_token": "<start>", "pad_token": "<pad>"}
    ids = {token: len(WORDS) + index for index, token in enumerate(special)}
    stops = {"eos_token_id": [ids["<end>"], ids["<turn>"]]}
    _, tokens = tokens_of(special, rows=64, texts=[[0, ids["<unused0>"]]], generation=stops, **roles)
    with pytest.raises((ValueError, TypeError)) as told:
        tokens.choose(wanted)
    assert why in str(told.value) and "mask_token_id" in str(told.value)
    assert tokens.choose().token == "<unused1>"
