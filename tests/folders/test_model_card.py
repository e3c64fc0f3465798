"""The model card: what it says of a run, what it does not claim, and that the Hub and a shell can read it."""

import json
import os
import re
import shlex

import pytest
import torch
from conftest import KINDS, tiny_drafter, tiny_model
from huggingface_hub import ModelCard
from readers import checked

import draft_opd_trl
from draft_opd_trl.core.markdown import plain
from draft_opd_trl.core.target import Target
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.folders.model_card import TrainingRun, target_licence, write_model_card
from draft_opd_trl.folders.serving import launch_commands


ID = "Qwen/Qwen3-4B"
SLOTS = [0.75, 0.5, 0.25, 0.125]


def evaluation(step, tau, prefix="eval"):
    """A log as `evaluate` makes it."""
    slots = {f"{prefix}_acceptance_slot_{k}": share * tau / 4 for k, share in enumerate(SLOTS, start=1)}
    return {
        f"{prefix}_acceptance_length": tau,
        f"{prefix}_prompts": 64,
        f"{prefix}_runtime": 9.0,
        **slots,
        "step": step,
    }


def run(*history, step=300, **options):
    history = [{"loss": 1.0, "acceptance/length": 3.0, "step": 1}, *history]
    recipe = {"lmbda": 1.0, "learning_rate": 3e-4}
    return TrainingRun(step=step, history=history, recipe=recipe, law="temperature 0", tokens=1234567, **options)


@pytest.fixture(scope="module", params=KINDS)
def drafter(request):
    return tiny_drafter(request.param, Target(tiny_model("qwen3")))


@pytest.fixture
def card(drafter, tmp_path):
    def write(*args, **kwargs):
        write_model_card(tmp_path / "out" / "README.md", "user/mine", drafter, *args, **kwargs)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"]
        return checked(ModelCard.load(tmp_path / "out" / "README.md"))

    return write


def test_before_and_after(card, drafter):
    card = card(ID, "abc123", run=run(evaluation(0, 3.0), evaluation(150, 3.5), evaluation(300, 4.0)))
    assert "| | before training | after step 300 |\n|---|---|---|\n| **τ** | **3.000** | **4.000** |" in card.text
    assert "| slot 1 | 0.562 | 0.750 |" in card.text and "| slot 4 | 0.094 | 0.125 |" in card.text
    assert "Prompts: 64.\n" in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"acceptance_length": 4.0, **{f"acceptance_slot_{k}": SLOTS[k - 1] for k in (1, 2, 3, 4)}}
    assert {result.dataset_name for result in card.data.eval_results} == {"Evaluation prompts (64)"}
    assert card.data.model_name == "user/mine"
    assert "300 optimizer steps on\n1,234,567 tokens" in card.text
    assert card.data.base_model == ID
    assert f"[`{ID}`](https://huggingface.co/{ID}/tree/abc123), revision `abc123`" in card.text
    assert f"| a block | the last committed token and {drafter.num_draft_tokens} proposals |" in card.text
    assert f"draft_opd_trl {draft_opd_trl.__version__}" in card.text and f"torch {torch.__version__}" in card.text
    assert {drafter.kind, "draft-opd", "speculative-decoding"} == set(card.data.tags)


@pytest.mark.parametrize(
    ("history", "columns", "said"),
    [
        ([evaluation(300, 4.0)], "after step 300", "There was no evaluation before training."),
        ([evaluation(0, 3.0)], "before training", "There was no evaluation after training."),
        ([evaluation(0, 3.0), evaluation(200, 3.9)], "before training | after step 200", "later, of step 300."),
    ],
)
def test_what_was_not_measured_is_said(card, history, columns, said):
    card = card(ID, run=run(*history))
    assert f"| | {columns} |" in card.text
    assert said in card.text
    # The index is about the weights beside it.
    assert (card.data.eval_results is not None) == (history[-1]["step"] == 300)


def test_a_run_without_evaluation_and_a_drafter_without_a_run(card):
    assert "It was not evaluated in the run that trained it." in (without := card(ID, run=run())).text
    assert "τ" not in without.text and without.data.eval_results is None
    bare = card()
    assert "## Training" not in bare.text and "## Acceptance" not in bare.text
    assert "speculative decoding with its target" in bare.text and "vllm serve TARGET" in bare.text
    assert bare.data.base_model is None


def test_how_many_proposals_to_serve_with(card):
    told = {"eval_serve_batch_8_num_draft_tokens": 3, "eval_serve_batch_8_speedup": 1.234}
    told |= {"eval_serve_batch_64_num_draft_tokens": 0, "eval_serve_batch_64_speedup": 1.0}
    text = card(ID, run=run(evaluation(0, 3.0), evaluation(300, 4.0) | told)).text
    assert "| to serve with at batch 8 |  | K = 3 (1.23 times plain) |\n" in text
    assert "| to serve with at batch 64 |  | no drafter |\n\nK, the proposals to serve with, is foreseen" in text
    assert "to serve with" not in card(ID, run=run(evaluation(300, 4.0))).text


def test_an_evaluation_after_the_weights_is_not_theirs(card):
    """The best checkpoint of a run was loaded: what came later is another drafter's."""
    card = card(ID, run=run(evaluation(0, 3.0), evaluation(100, 3.5), evaluation(300, 3.2), step=100))
    assert "| **τ** | **3.000** | **3.500** |" in card.text
    assert card.data.eval_results[0].metric_value == 3.5


@pytest.mark.parametrize(
    ("share", "said"),
    [({"lmbda": 1.0}, "By [Draft-OPD]"), ({"lmbda": 0.0}, "By SFT, the baseline of [Draft-OPD]")]
    + [({"lmbda": 0.0, "lmbda_end": 1.0}, "By [Draft-OPD]")],
)
def test_sft_is_called_so(card, share, said):
    told = run()
    told.recipe = share
    assert said in card(ID, run=told).text


def test_several_sets_of_prompts(card):
    history = [evaluation(0, 3.0, "eval_math"), evaluation(300, 4.0, "eval_math"), evaluation(300, 2.0, "eval_code")]
    card = card(ID, run=run(*history))
    assert "math prompts: 64.\n" in card.text
    assert "code prompts: 64. There was no evaluation before training." in card.text
    taus = [result for result in card.data.eval_results if result.metric_type == "acceptance_length"]
    assert [(tau.dataset_type, tau.metric_value) for tau in taus] == [("math", 4.0), ("code", 2.0)]


def test_what_lies_on_this_machine_is_named_without_its_folders(card, drafter, tmp_path, monkeypatch):
    monkeypatch.setattr(drafter.config, "_name_or_path", str(tmp_path / "start"))
    card = card(str(tmp_path / "pocket"), run=run(dataset_name=str(tmp_path / "prompts.jsonl")))
    assert str(tmp_path) not in str(card)
    assert "speculative decoding with `pocket`" in card.text and "| trained from | `start` |" in card.text
    assert "prompts of `prompts.jsonl`" in card.text
    assert card.data.base_model is None and card.data.datasets is None


def test_the_licence_is_the_targets_own(card, tmp_path):
    (tmp_path / "pocket").mkdir()
    readme = tmp_path / "pocket" / "README.md"
    for unreadable in (None, "no metadata", "---\nlicense: [\n---\n"):
        target_licence.cache_clear()
        if unreadable is not None:
            readme.write_text(unreadable)
        assert "licence" not in card(str(tmp_path / "pocket")).text
    target_licence.cache_clear()
    fields = "license: other\nlicense_name: pocket-1\nlicense_link: https://example.com/licence"
    readme.write_text(f"---\n{fields}\n---\n# Pocket")
    with_licence = card(str(tmp_path / "pocket"))
    assert "| licence of the target | pocket-1 |" in with_licence.text
    assert (with_licence.data.license, with_licence.data.license_name) == ("other", "pocket-1")
    assert with_licence.data.license_link == "https://example.com/licence"


HOSTILE = [
    "5",
    "[5]",
    "{}",
    "[" * 60_000,
    "&a [*a, *a]",
    "2024-99-99",
    "!!python/object/apply:os.system [exit]",
    "x" * 100_000,
    "'\\0'",
    "[unclosed",
    "{a: {b: [1, 2]}, ? [x] : y}",
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["tags", "license", "base_model", "model-index", "license_link"])
def test_nothing_in_a_targets_card_stops_a_run(drafter, tmp_path, field, value):
    target_licence.cache_clear()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "README.md").write_text(f"---\n{field}: {value}\n---\n# Target")
    write_model_card(tmp_path / "README.md", "user/mine", drafter, str(tmp_path / "target"))
    card = checked(ModelCard.load(tmp_path / "README.md"))
    # Nothing of it is taken over but a licence that is a word.
    assert set(card.data.tags) == {drafter.kind, "draft-opd", "speculative-decoding"}
    assert card.data.base_model is None and card.data.eval_results is None
    assert card.data.license is None or (field == "license" and isinstance(card.data.license, str))


@pytest.mark.parametrize("content", [b"\xff\xfe---", b"---\n", b"", b"---\n- a\n---\n", b"---\n\x00: 1\n---\n"])
def test_nor_does_its_form(drafter, tmp_path, content):
    target_licence.cache_clear()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "README.md").write_bytes(content)
    assert target_licence(str(tmp_path / "target"), None) == {}
    target_licence.cache_clear()
    (tmp_path / "target" / "README.md").unlink()
    os.mkfifo(tmp_path / "target" / "README.md")
    assert target_licence(str(tmp_path / "target"), None) == {}


NAMES = [
    "a|b",
    "a`b",
    "``",
    "<script>alert(1)</script>",
    "[x](javascript:y)",
    "a\nb\n# c",
    "a b'c\"$(id)",
    "***",
    "a\n```\nb",
    "&lt;",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_stay_text(drafter, tmp_path, monkeypatch, name):
    monkeypatch.setattr(drafter.config, "_name_or_path", name)
    told = run(evaluation(300, 4.0), dataset_name=name)
    told.recipe = {"lmbda": 1.0, name: name, "chat_template_kwargs": {name: name}}
    write_model_card(tmp_path / "README.md", name, drafter, name, name, run=told)
    text = checked(ModelCard.load(tmp_path / "README.md")).text
    outside = re.sub(r"(?ms)^(`{3,})\w+$.*?^\1$", "", text)  # code blocks
    outside = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)  # code spans
    assert "<" not in outside and "](javascript" not in outside.replace("\\]", "")
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [f"# {plain(name)}"]
    commands = re.findall(r"(?ms)^(`{3,})bash$\n(.*?)\n\1$", text)
    assert len(commands) == 2
    for _, command in commands:
        assert name in " ".join(shlex.split(command.replace("\\\n", ""))) or json.dumps(name)[1:-1] in command


def test_no_secret_is_in_the_settings(card):
    told = run()
    told.recipe = {
        "lmbda": 1.0,
        "optim": "https://user:hunter2@host/path",
        "chat_template_kwargs": {
            "enable_thinking": False,
            "style": "short",
            "api_key": "hunter2",
            "tools": [{"key": "hunter2"}],
            "url": "http://user:hunter2@host",
        },
    }
    text = card(ID, run=told).text
    assert "hunter2" not in text
    assert "| `optim` | https://host/path |" in text
    assert "| `chat_template_kwargs` | enable_thinking: False, style: short, tools: …, url: http://host |" in text


def test_the_card_of_an_adapter_sends_nobody_to_an_engine_with_it(card, drafter, monkeypatch):
    monkeypatch.setattr(drafter.config, "_name_or_path", "user/base")
    text = card(ID, adapter="LORA").text
    export = f"draft-opd export user/mine --format {drafter.kind} --output_dir user/mine-whole"
    assert "holds an adapter (LORA) on [`user/base`]" in text and f"```bash\n{export}\n```" in text
    assert f'{drafter.auto_class}.from_pretrained("user/mine-whole"' in text and 'load_drafter("user/mine")' in text
    for command in launch_commands(drafter, ID, "user/mine-whole").values():
        assert command in text
    assert "adapter" not in card(ID).text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_the_card_promises_the_engines_that_inspection_does(kind, family, tmp_path):
    """Not every engine serves every target with every kind."""
    target = Target(tiny_model(family))
    target.model.save_pretrained(tmp_path / "target")
    drafter = tiny_drafter(kind, target)
    drafter.save_pretrained(tmp_path / "drafter")
    told = inspect_drafter(str(tmp_path / "drafter"), str(tmp_path / "target"))
    write_model_card(tmp_path / "README.md", "user/mine", drafter, ID)
    text = ModelCard.load(tmp_path / "README.md").text
    for engine, words in (("vLLM", "vllm serve"), ("SGLang", "sglang.launch_server")):
        assert (words in text) == (engine in told["launch"]), engine
    for fault in told["faults"]:
        assert f"Note: {fault['fault']}" in text


def test_the_card_shows_the_commands(card, drafter):
    text = card(ID).text
    for engine, command in launch_commands(drafter, ID, "user/mine").items():
        assert f"With {engine}:\n\n```bash\n{command}\n```" in text
