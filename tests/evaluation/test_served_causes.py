"""What an engine has otherwise is found, each planted fault with its own sentence, and a right engine has none."""

import copy
import json

import pytest
import torch
from conftest import KINDS, save_target, tiny_drafter, tiny_stopping_model, tiny_tokenizer, train_drafter
from engine_server import EngineServer

from draft_opd_trl.cli import main
from draft_opd_trl.commands.evaluate import show
from draft_opd_trl.core.target import Target


KIND = KINDS[0]
WORDS = ["abc", "the cat", "hello", "zz top", "quick fox", "lazy", "over and over", "q", "xyz", "mmm"]
SYSTEM = "<|system|>be good<|end|>"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target, its trained drafter, and prompts, in a folder."""
    place = tmp_path_factory.mktemp("served")
    model = tiny_stopping_model()
    save_target(model, place / "target")
    target, tokenizer = Target(model), tiny_tokenizer()
    rows = [[{"role": "user", "content": words}] for words in WORDS]
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    prompts = tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=True)["input_ids"]
    drafter = train_drafter(target, tiny_drafter(KIND, target), prompts)
    drafter.save_pretrained(place / "drafter")
    return place, target, drafter, tokenizer, prompts


def _twin(drafter, target):
    """The same drafter, another object."""
    twin = tiny_drafter(drafter.kind, target)
    twin.load_state_dict(drafter.state_dict())
    return twin


class _Told:
    """A drafter that is told something else."""

    def __init__(self, drafter, **told):
        self.__dict__.update(told)
        self._drafter = drafter

    def __getattr__(self, name):
        return getattr(self._drafter, name)


def _evaluate(world, engine, capsys, *words, drafter="drafter"):
    place = world[0]
    with engine as server:
        command = ["evaluate", "--server_url", server.url, "--suite", str(place / "prompts.jsonl")]
        command += ["--model", str(place / drafter), "--teacher", str(place / "target"), "--max_new_tokens", "40"]
        main([*command, "--batch_size", "4", "--json", *words])
    return json.loads(capsys.readouterr().out)


def _found(result):
    checks = result["results"][0]["explained"]["checks"]
    return {check["cause"]: check for check in checks if check["found"]}


@pytest.mark.parametrize(("engine", "tells"), [("vLLM", "answer"), ("vLLM", "counters"), ("SGLang", "answer")])
def test_a_right_engine_has_our_figures_and_no_fault(world, engine, tells, capsys):
    _, target, drafter, tokenizer, _ = world
    result = _evaluate(world, EngineServer(target, drafter, tokenizer, engine, tells), capsys)
    measured = result["results"][0]
    served, ours, told = measured["served"], measured["ours"], measured["explained"]
    assert _found(result) == {}
    assert [check["cause"] for check in told["checks"] if check["found"] is None] == []
    assert served["acceptance_length"] == pytest.approx(ours["acceptance_length"], abs=1e-12)
    assert list(told["difference"].values()) == pytest.approx([0, 0, 0], abs=1e-12)
    assert served["acceptance_length"] > 1.3  # or nothing could fall
    assert served["verifications"] == ours["verifications"] and served["tokens"] == ours["tokens"]
    assert served["num_draft_tokens"] == drafter.num_draft_tokens == len(served["acceptance_by_slot"])
    assert served["parts"] == (10 if tells == "answer" else 3)
    assert result["server"]["engine"] == engine
    text = show(result)
    assert "served − ours: +0.000 τ" in text and ("by answer" in text or "counters" in text or "Text by text" in text)


def _quantized(target):
    """The target with its weights rounded to few bits."""
    model = copy.deepcopy(target.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "layers" in name:
                step = weight.abs().amax(1, keepdim=True) / 7
                weight.copy_((weight / step).round() * step)
    return Target(model)


def _shorter(drafter, target):
    twin = _twin(drafter, target)
    twin.config.block_size -= 2
    return twin


def _masked(drafter, target):
    twin = _twin(drafter, target)
    twin.mask_token_id = 0
    return twin


def _templated(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = SYSTEM + tokenizer.chat_template
    return other


def _plant(fault, world):
    """An engine with that fault."""
    _, target, drafter, tokenizer, prompts = world
    if fault == "template":
        return EngineServer(target, drafter, _templated(tokenizer))
    if fault == "thinking":
        return EngineServer(target, drafter, tokenizer, kwargs={"enable_thinking": False})
    if fault == "taps":
        taps = list(drafter.target_layer_ids)
        return EngineServer(target, _Told(drafter, target_layer_ids=[taps[0] - 1, *taps[1:]]), tokenizer)
    if fault == "mask token":
        return EngineServer(target, _masked(drafter, target), tokenizer)
    if fault == "K":
        return EngineServer(target, _shorter(drafter, target), tokenizer)
    if fault == "target":
        other = _quantized(target)
        return EngineServer(other, _twin(drafter, other), tokenizer)
    foreign = train_drafter(target, tiny_drafter(KIND, target, seed=5), prompts, steps=30)
    return EngineServer(target, foreign, tokenizer)


SENTENCES = {
    "template": ["10 of 10 prompts have other ids; row 0 parts at token 0", "'<|system|>be good<|", "--chat-template"],
    "thinking": ["the server writes them as with `enable_thinking` false, and it is unset here", "--chat_template_kw"],
    "taps": ["its taps at layers [0, 2] instead of [1, 2] it has", "--served_model"],
    "mask token": ["with mask token 0 instead of 47 it has", "--served_model"],
    "K": ["the engine proposes 2 tokens a verification, and the drafter was trained to propose 4", "Start it with"],
    "target": ["texts are not what --teacher writes", "--load_in_4bit"],
    "drafter": [
        "other taps, ",
        "other mask tokens has the same counts. So the engine has other weights",
        "--served_model",
    ],
}


@pytest.mark.parametrize(
    ("fault", "tells"),
    [*((fault, "answer") for fault in SENTENCES), *((fault, "counters") for fault in ("taps", "drafter"))],
)
def test_each_planted_fault_is_found_by_its_own_sentence(world, fault, tells, capsys):
    engine = _plant(fault, world)
    engine.tells = tells
    result = _evaluate(world, engine, capsys)
    found = _found(result)
    assert list(found) == [fault], result["results"][0]["explained"]
    said = show(result)
    for words in SENTENCES[fault]:
        assert words in said, said


def test_a_cache_that_loses_what_was_drafted_from_is_found(world, capsys):
    """Seen once, a prompt's states are gone: the drafter starts from nothing."""
    _, target, drafter, tokenizer, _ = world

    class Forgetful:
        def __init__(self, drafter):
            self._drafter = drafter

        def __getattr__(self, name):
            return getattr(self._drafter, name)

        def extend(self, state, features, *rest):
            return self._drafter.extend(state, torch.zeros_like(features), *rest)

    # The first sending hits the cache for one text of each batch already, or nothing would be amiss.
    engine = EngineServer(target, drafter, tokenizer, forgets=Forgetful)
    engine.seen = {tuple(prompt) for prompt in world[4][:5]}
    found = _found(_evaluate(world, engine, capsys))
    assert list(found) == ["prefix caching"]
    assert "10 prompts sent again" in found["prefix caching"]["said"]
    assert "--no-enable-prefix-caching" in found["prefix caching"]["remedy"]


@pytest.mark.parametrize("drawn", [False, True])
def test_proposals_that_are_drawn_otherwise_are_found(world, drawn, capsys):
    _, target, drafter, tokenizer, _ = world
    words = ["--temperature", "1", "--max_new_tokens", "120", *(["--sample_proposals"] if drawn else [])]
    right = EngineServer(target, drafter, tokenizer, sample_proposals=drawn)
    assert _found(_evaluate(world, right, capsys, *words)) == {}
    wrong = EngineServer(target, drafter, tokenizer, sample_proposals=not drawn)
    found = _found(_evaluate(world, wrong, capsys, *words))
    assert list(found) == ["draft sampling"]
    assert f"Measure with{'out' if drawn else ''} --sample_proposals" in found["draft sampling"]["remedy"]


def test_the_folder_that_was_served_is_compared(world, tmp_path, capsys):
    place, target, drafter, tokenizer, _ = world
    masked = _masked(drafter, target)
    folder = tmp_path / "wrong"
    drafter.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dflash_config"] |= {"mask_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    # SGLang names it by itself.
    started = {"speculative_draft_model_path": str(folder)}
    found = _found(_evaluate(world, EngineServer(target, masked, tokenizer, "SGLang", started=started), capsys))
    assert list(found) == ["mask token"]
    assert found["mask token"]["said"] == f"{folder} has the mask_token_id 0, and --model 47"
    tiny_drafter(KIND, target, seed=5).save_pretrained(tmp_path / "foreign")
    engine = EngineServer(target, masked, tokenizer)
    found = _found(_evaluate(world, engine, capsys, "--served_model", str(tmp_path / "foreign")))
    assert list(found) == ["drafter"] and "is another dflash drafter" in found["drafter"]["said"]
    engine = EngineServer(target, masked, tokenizer)
    found = _found(_evaluate(world, engine, capsys, "--served_model", str(place / "drafter")))
    assert list(found) == ["engine"]


def test_without_a_drafter_the_engine_alone_is_measured(world, capsys):
    place, target, drafter, tokenizer, _ = world
    with EngineServer(target, drafter, tokenizer) as server:
        words = ["--server_url", server.url, "--suite", str(place / "prompts.jsonl"), "--max_new_tokens", "40"]
        main(["evaluate", *words, "--json"])
        result = json.loads(capsys.readouterr().out)
    assert result["results"][0]["ours"] is None and result["model"] is None
    assert result["results"][0]["served"]["prompts"] == 10
    assert "vLLM 0.32.0 at http" in show(result)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--by", "server", "--model", "a", "--teacher", "b"], "no --server_url says where it listens"),
        (["--teacher", "b"], "--model is missing"),
        (["--model", "a"], "--teacher is missing"),
        (["--server_url", "http://x", "--by", "speculation"], "Drop one of them"),
        (["--server_url", "http://x", "--model", "a"], "--model and --teacher come together"),
        (["--server_url", "http://x", "--served_model", "a"], "Give --model and --teacher"),
        (["--server_url", "http://x", "--compare", "a"], "a server has one"),
        (["--server_url", "x"], "must be an address such as http://localhost:8000"),
    ],
)
def test_options_that_cannot_stand_together(words, why, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--suite", "pocket", *words])
    assert why in capsys.readouterr().err
