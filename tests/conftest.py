"""Tiny models that behave like the real ones: three families of targets, a scripted target, drafters of every kind."""

import itertools
import os
import socket


# Before any import of transformers: tests reach no network, and nothing may behave differently because CI is set. What
# tests call the Hub is a port of this machine, at which a server listens only where a test has started it.
HUB_SOCKET = socket.socket()
HUB_SOCKET.bind(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_SOCKET.getsockname()[1]}"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("CI", None)

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draft_opd_trl.drafters import DRAFTERS, Proposal, create_drafter  # noqa: E402
from draft_opd_trl.replay import text_blocks  # noqa: E402
from draft_opd_trl.sampling import probabilities  # noqa: E402
from draft_opd_trl.sampling_params import SamplingParams  # noqa: E402
from draft_opd_trl.speculation import SpeculationSettings, speculate  # noqa: E402
from draft_opd_trl.target import Target  # noqa: E402
from draft_opd_trl.vocabulary import to_draft_ids  # noqa: E402


torch.set_num_threads(1)

FAMILIES = ("qwen3", "llama", "gemma3")
KINDS = tuple(DRAFTERS)
VOCAB = 48
# What `from_target` of each kind is given for a tiny drafter.
TINY = {
    "dflash": {"mask_token_id": VOCAB - 1, "block_size": 5, "num_hidden_layers": 2, "target_layer_ids": [1, 2]},
    # Five target tokens cannot be drafted.
    "eagle3": {
        "num_draft_tokens": 4,
        "target_layer_ids": [0, 1, 2],
        "draft_token_ids": [token for token in range(VOCAB) if token % 10 != 7],
    },
}
# What published EAGLE-3 checkpoints vary.
EAGLE3_VARIANTS = {
    "plain": {},
    "norms": {"fc_norm": True, "norm_output": True},
    "before-residual": {"norm_before_residual": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "narrow": {"hidden_size": 16},
    "full-vocabulary": {"draft_token_ids": None},
}


def tiny_model(family, vocab_size=VOCAB, seed=0, **overrides):
    """A seeded random causal LM whose greedy text is varied."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**{**shape, **overrides}))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))
    hybrid = {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 20.0,
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **hybrid, **overrides}))


def tiny_drafter(kind, target, seed=1, **overrides):
    """A seeded, untrained drafter whose norms are not all ones, so that no weight is without effect."""
    torch.manual_seed(seed)
    options = {**TINY.get(kind, {}), **overrides}
    if "mask_token_id" in options:
        options["mask_token_id"] = min(options["mask_token_id"], target.vocab_size - 1)
    if options.get("draft_token_ids"):
        options["draft_token_ids"] = [token for token in options["draft_token_ids"] if token < target.vocab_size]
    drafter = create_drafter(kind, target, **options).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return drafter


def draft_labels(drafter, tokens):
    """Target ids as labels of the drafter's own vocabulary; where it has none −100, which cross-entropy leaves out."""
    if drafter.vocab_map is None:
        return tokens
    ids, inside = to_draft_ids(tokens, drafter.vocab_map)
    return torch.where(inside, ids, -100)


def random_prompts(count, vocab_size=VOCAB, longest=9, seed=0):
    """Ragged prompts of 1 … `longest` tokens."""
    draws = torch.Generator().manual_seed(seed)
    sizes = [1 + int(torch.randint(longest, (), generator=draws)) for _ in range(count)]
    return [torch.randint(1, vocab_size - 1, (size,), generator=draws).tolist() for size in sizes]


def train_drafter(target, drafter, prompts, steps=100, max_new_tokens=40):
    """A little SFT on the target's own greedy text, so that blocks end in every way: early, late and not at all."""
    rollout = speculate(target, None, prompts, SpeculationSettings(max_new_tokens, [], batch_size=len(prompts)))
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    rows = torch.arange(len(prompts)).repeat_interleave(12)
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(steps):
        share = torch.rand(len(rows), generator=draws)
        anchors = rollout.prompt_lengths[rows] + (share * (max_new_tokens - 6)).long()
        blocks = text_blocks(rollout, rows, anchors, drafter.num_draft_tokens)
        logits = drafter.logits(drafter.draft(features, rollout.tokens, blocks))
        labels = draft_labels(drafter, blocks.draft_tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


def scripted_target(table):
    """
    A real Qwen3 whose next-token logits are `table[last token]`, `(V, V)`.

    One-hot embeddings, layers that add nothing, and a head that undoes the final norm.
    """
    table = torch.as_tensor(table, dtype=torch.float32)
    size = table.shape[0]
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table.T / size**0.5)
    return Target(model)


class ScriptedDrafter:
    """
    Keeps the drafter contract by table: after token t it proposes `proposals[t]` `(V, K)`, or draws from
    `probs[t]` `(V, K, V)`, at temperature 1.
    """

    vocab_map = None
    target_layer_ids = [0]

    def __init__(self, proposals, probs=None):
        self.proposals = torch.as_tensor(proposals)
        self.probs = probs

    @property
    def num_draft_tokens(self):
        return self.proposals.shape[1]

    def start(self, batch_size, max_length):
        return None

    def extend(self, state, features, positions, tokens, lanes=None):
        pass

    def propose(self, state, tokens, anchors, limit, choose):
        if choose.sampling is None or choose.sampling.greedy:
            return Proposal(self.proposals[tokens])
        return Proposal(*choose(self.probs[tokens].log()))


def counting_target(vocab_size=12):
    """The scripted target that counts: after token t comes t + 1, after the last comes 0."""
    return scripted_target(10.0 * torch.eye(vocab_size).roll(1, dims=1))


def chi_square_p(counts, law):
    """p-value of observed `counts` under `law`; cells expected below 5 are merged into one."""
    counts, law = torch.as_tensor(counts).double().flatten(), law.double().flatten()
    expected = law * counts.sum()
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    kept = expected > 1e-9
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = torch.tensor(max(int(kept.sum()) - 1, 1), dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def same_law_p(first, second):
    """p-value of two histograms coming from one law; cells that hold fewer than 10 together are merged into one."""
    counts = torch.stack([torch.as_tensor(first).double().flatten(), torch.as_tensor(second).double().flatten()])
    small = counts.sum(0) < 10
    counts = torch.cat([counts[:, ~small], counts[:, small].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(max(counts.shape[1] - 1, 1), dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


@torch.no_grad()
def continuation_law(target, prompt, length, sampling):
    """Probability of each continuation of `length` tokens, by running the target on every one: `(V,) * length`."""
    size = target.vocab_size
    law = torch.ones(())
    for depth in range(length):
        grid = torch.tensor(list(itertools.product(range(size), repeat=depth)), dtype=torch.long)
        grid = grid.reshape(size**depth, depth)
        texts = torch.cat([torch.tensor(prompt).expand(len(grid), -1), grid], dim=1)
        step = probabilities(target.model(input_ids=texts).logits[:, -1], sampling)
        law = (law.reshape(-1, 1) * step).reshape((size,) * (depth + 1))
    return law


@pytest.fixture(scope="session", params=FAMILIES)
def target(request):
    return Target(tiny_model(request.param))


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def prompts():
    return random_prompts(7)


@pytest.fixture(scope="session")
def drafter(target, kind, prompts):
    """A drafter that is sometimes right."""
    return train_drafter(target, tiny_drafter(kind, target), prompts)


# Laws of text that small vocabularies are tested under.
LAWS = {
    "hot": SamplingParams(1.3),
    "top-k": SamplingParams(0.7, top_k=3),
    "top-p": SamplingParams(0.8, top_p=0.7),
}


@pytest.fixture(scope="session", params=FAMILIES)
def small_target(request):
    """Eight tokens: few enough to count texts."""
    return Target(tiny_model(request.param, vocab_size=8, seed=3, initializer_range=0.2))


@pytest.fixture(scope="session")
def small_drafter(small_target, kind):
    texts = [[3, 1], *random_prompts(5, vocab_size=8)]
    return train_drafter(small_target, tiny_drafter(kind, small_target), texts, steps=40)


@pytest.fixture(scope="session")
def qwen_target():
    return Target(tiny_model("qwen3"))


@pytest.fixture(scope="session")
def qwen_drafter(qwen_target, kind, prompts):
    return train_drafter(qwen_target, tiny_drafter(kind, qwen_target), prompts)


STOP = 0  # <|end|> of the tiny tokenizer, which is also the padding


@pytest.fixture(scope="module")
def model():
    """A target to train against, of two stop tokens."""
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = [STOP, 3]
    return model


@pytest.fixture(scope="module", params=KINDS)
def drafter_folder(request, model, tmp_path_factory):
    """The folder of an untrained drafter for `model`, of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_drafter(request.param, Target(model)).save_pretrained(folder)
    return str(folder)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<|nothink|>{% endif %}{% endif %}"
)


def tiny_tokenizer():
    """One token a character, a chat template with a thinking switch, and pad == eos."""
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|nothink|>"]
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    vocabulary = {token: index for index, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", additional_special_tokens=specials[1:]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()
