"""Tiny models that behave like the real ones: three families of targets, a scripted target, drafters of every kind."""

import json
import os
import socket
import sys
from pathlib import Path


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
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    dynamic_module_utils,
)

from draft_opd_trl.core.sampling_params import SamplingParams  # noqa: E402
from draft_opd_trl.core.target import Target  # noqa: E402
from draft_opd_trl.core.vocabulary import to_draft_ids  # noqa: E402
from draft_opd_trl.decoding.replay import text_blocks  # noqa: E402
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate  # noqa: E402
from draft_opd_trl.drafters import DRAFTERS, DrafterConfig, Proposal, create_drafter  # noqa: E402


torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "examples" / "pocket"
SHIPPED = sorted(POCKET.glob("drafter-*"))
SHIPPED_KINDS = [kind for kind in DRAFTERS if (POCKET / f"drafter-{kind}").is_dir()]
# Options of commands that take a drafter and its target.
SHIPPED_PAIR = ["--model", str(SHIPPED[0]), "--teacher", str(POCKET / "target")]
HELD_OUT = str(POCKET / "prompts" / "heldout.jsonl")

FAMILIES = ("qwen3", "llama", "gemma3")
# Targets with layers that keep a state of their own: no cache of positions can take a token back from it.
RECURRENT = {"qwen3_5_text": ["linear_attention", "full_attention"] * 2, "lfm2": ["conv", "full_attention"] * 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Whatever is registered goes through the general tests.
KINDS = tuple(DRAFTERS)
# Those that have a `speculators` layout.
IN_SPECULATORS = [
    kind
    for kind, drafter_class in DRAFTERS.items()
    if drafter_class.config_class.to_speculators is not DrafterConfig.to_speculators
]
# Those whose folder holds code; that of others is a plain model of transformers.
TRAVELLING = [kind for kind, drafter_class in DRAFTERS.items() if drafter_class.code_travels]
# Where one drafter will do, whichever.
ANY_KIND = KINDS[0]
VOCAB = 48


def _tiny_dflash(target):
    return {
        "mask_token_id": target.vocab_size - 1,
        "block_size": 5,
        "num_hidden_layers": 2,
        "target_layer_ids": [1, 2],
    }


def _tiny_dspark(target):
    return {**_tiny_dflash(target), "block_size": 4, "markov_rank": 6}


def _tiny_eagle3(target):
    # A tenth of the target's tokens cannot be drafted.
    ids = [token for token in range(target.vocab_size) if token % 10 != 7]
    return {"num_draft_tokens": 4, "target_layer_ids": [0, 1, 2], "draft_token_ids": ids}


# The one place that knows how a drafter of a kind is made tiny: target → options of `create_drafter`. A kind that is
# not here is made with its defaults; its own test file may put a line in.
TINY = {
    "dflash": _tiny_dflash,
    "dspark": _tiny_dspark,
    "eagle3": _tiny_eagle3,
    "causal_lm": lambda target: {"num_hidden_layers": 1},
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
    if family in RECURRENT:
        shape |= {"layer_types": RECURRENT[family]}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **LINEAR, **overrides}))
    hybrid = {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 20.0,
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **hybrid, **overrides}))


def tiny_options(kind, target):
    """What `create_drafter` is given for a tiny drafter of a kind."""
    return TINY[kind](target) if kind in TINY else {}


def tiny_drafter(kind, target, seed=1, **overrides):
    """A seeded, untrained drafter whose norms are not all ones, so that no weight is without effect."""
    torch.manual_seed(seed)
    options = {**tiny_options(kind, target), **overrides}
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
    texts = torch.arange(len(prompts), device=target.device).repeat_interleave(12)
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(steps):
        share = torch.rand(len(texts), generator=draws).to(target.device)
        anchors = rollout.prompt_lengths[texts] + (share * (max_new_tokens - 6)).long()
        blocks = text_blocks(rollout, texts, anchors, drafter.num_draft_tokens)
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


def pocket_target_and_prompts(count):
    """The shipped target and held-out prompts."""
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    lines = (POCKET / "prompts" / "heldout.jsonl").read_text().splitlines()[:count]
    messages = [json.loads(line)["prompt"] for line in lines]
    return Target(model), tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.fixture(scope="session", params=FAMILIES)
def target(request):
    return Target(tiny_model(request.param))


# As it is of the session, pytest runs all tests of one kind before those of the next, from file to file. A file whose
# own fixtures cost much marks its tests with `parametrize("kind", KINDS)` instead.
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
def target_folder(qwen_target, tmp_path_factory):
    """The folder of `qwen_target`."""
    folder = tmp_path_factory.mktemp("target")
    qwen_target.model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_folder(qwen_target, tmp_path):
    """`make_folder(kind, change)`: a folder of that kind for `qwen_target`, whose config went through `change`."""

    def folder(kind, change=lambda config: None, **options):
        tiny_drafter(kind, qwen_target, **options).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return folder


@pytest.fixture(scope="session")
def qwen_drafter(qwen_target, kind, prompts):
    return train_drafter(qwen_target, tiny_drafter(kind, qwen_target), prompts)


STOP = 0  # <|end|> of the tiny tokenizer, which is also the padding


STOPS = [STOP, 3]


def tiny_stopping_model(**options):
    """A target to train against, of two stop tokens."""
    model = tiny_model("qwen3", **options)
    model.generation_config.eos_token_id = STOPS
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_stopping_model()


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


def save_target(model, folder):
    """The folder of a target, with its tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def code_cache(tmp_path, monkeypatch):
    """An empty folder for code that comes along with models; what is imported is forgotten, before and after."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Another such folder that a test has put there would be found first.
    monkeypatch.setattr(sys, "path", [part for part in sys.path if not Path(part, "transformers_modules").is_dir()])
    yield
    forget()
