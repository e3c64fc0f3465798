"""The pocket tokenizer: byte-level BPE of 1024 tokens with single digits and a chat template in the Qwen style."""

from __future__ import annotations

from tasks import problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from wording import COLORS, ITEMS, NAMES, PLACES


VOCAB_SIZE = 1024
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|mask|>"]
# Letters with one space before, digits one by one, runs of other signs, runs of white space.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# Words that no problem uses; they fill the vocabulary up to its size.
FILLER = (
    "please explain while class import from with try except print range list string text more about you "
    "this should elif finally lambda global pass break continue dict tuple bool float"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on training problems; the same text always gives the same tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _corpus():
    """Problems and their answers, and the word lists once more so that every word to copy is one token."""
    for problem in problems("train", 5500, seed=-1):
        yield f"system\nuser\n{problem['prompt']}"
        yield f"assistant\n{problem['answer_text']}"
    yield from [FILLER] * 200
    words = [*NAMES, *ITEMS, *(f"{item}s" for item in ITEMS), *COLORS, *PLACES]
    for _ in range(200):
        yield " " + " ".join(words)
