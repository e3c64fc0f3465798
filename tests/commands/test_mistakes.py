"""What a new user does wrong, through the command line: one line that says what, why and what to do."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from conftest import ANY_KIND, save_target, tiny_drafter, tiny_model, tiny_stopping_model

from draft_opd_trl.cli import main
from draft_opd_trl.core.target import Target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target, its drafter, prompts, and what is wrong with copies of them."""
    place = tmp_path_factory.mktemp("place")
    model = tiny_stopping_model()
    save_target(model, place / "target")
    tiny_drafter(ANY_KIND, Target(model)).save_pretrained(place / "drafter")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"ab{'c' * i}"}) + "\n" for i in range(12)))

    def copy(name):
        return Path(shutil.copytree(place / "target", place / name))

    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (copy("mute") / "tokenizer.json").unlink()
    (place / "mute" / "tokenizer_config.json").unlink()
    (copy("garbled") / "tokenizer.json").write_text("{")
    (copy("headless") / "config.json").unlink()
    (copy("torn") / "config.json").write_text("{")
    other = copy("unknown") / "config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "model_type": "zz"}))
    save_target(tiny_model("qwen3", vocab_size=8), place / "small")
    narrow = copy("narrow") / "config.json"
    deeper = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    narrow.write_text(json.dumps({**json.loads(narrow.read_text()), **deeper}))
    for name, content in {
        "broken.jsonl": '{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n',
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "words.jsonl": '{"prompt": "a"}\n"b"\n',
        "twice.jsonl": '{"prompt": "a", "prompt": "b"}\n',
        "images.jsonl": 12 * f"{json.dumps({'prompt': [{'role': 'user', 'content': [{'type': 'image'}]}]})}\n",
        "list.json": '[{"prompt": "a"},',
        "rows.parquet": "hello",
        "syntax.yaml": "num_anchors: [1,\nlmbda: 1\n",
    }.items():
        (place / name).write_text(content)
    (place / "nothing").mkdir()
    (place / "latin.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    return place


def words_of(command, place, options):
    given = {"model": "drafter", "teacher": "target"}
    given |= {"evaluate": {"suite": "prompts.jsonl"}, "trace": {"suite": "prompts.jsonl"}}.get(command, {})
    if command == "train":
        given |= {"dataset_name": "prompts.jsonl", "num_eval_prompts": "2", "output_dir": "out"}
    if command == "plan":
        given |= {"output_dir": "out"}
    if command in ("inspect", "export"):
        given = {}
    words = [command, *options.pop("_", [])]
    for name, value in {**given, **options}.items():
        # What lies in the place is a path there, and everything else is itself.
        there = (place / str(value)).exists() or name in ("output_dir", "output_file", "config")
        words += [f"--{name}", str(place / str(value)) if there and value != "" else str(value)]
    return words


MISTAKES = [
    # Names
    ("evaluate", {"model": "nowhere"}, ["'nowhere' is not a folder here", "Give the path of a drafter folder"]),
    ("plan", {"model": "nowhere"}, ["drafter 'nowhere'", "Give the path of a drafter folder"]),
    ("evaluate", {"teacher": "nowhere"}, ["target 'nowhere' is no folder here", "Give the path of a model's folder"]),
    ("train", {"teacher": "no/where"}, ["target 'no/where' is no folder here", "Give the path of a model's folder"]),
    ("plan", {"teacher": "nowhere"}, ["target 'nowhere' is no folder here", "Give the path"]),
    ("train", {"dataset_name": "nowhere.jsonl"}, ["nowhere.jsonl is not a file here. Give the path of a"]),
    ("train", {"dataset_name": "no/where"}, ["'no/where' is no data set here", "give a local file or folder"]),
    ("train", {"teacher": "headless"}, ["target", "headless holds no config.json", "Give one that is"]),
    # What lies there is something else
    *(
        (
            command,
            {"model": "target", "teacher": "drafter"},
            [f"of kind {ANY_KIND}", "look swapped", "--teacher"],
        )
        for command in ("evaluate", "trace", "train", "plan")
    ),
    ("evaluate", {"model": "target"}, ["holds a plain", "no drafter", "draft-opd export", "If it is the target"]),
    ("evaluate", {"teacher": "cut"}, ["cut/model.safetensors are damaged or cut off", "download them again"]),
    ("train", {"teacher": "cut"}, ["cut/model.safetensors are damaged or cut off", "download them again"]),
    ("evaluate", {"teacher": "narrow"}, ["lacks", "would be random", "download it again"]),
    ("evaluate", {"teacher": "mute"}, ["comes without a tokenizer", "Put its files beside the weights"]),
    ("train", {"teacher": "garbled"}, ["tokenizer of the target", "could not be read", "Put its files"]),
    ("train", {"teacher": "small"}, ["the target's vocabulary is 8", "another model's"]),
    ("train", {"teacher": "torn"}, ["torn/config.json cannot be read"]),
    ("train", {"teacher": "unknown"}, ["config.json of the target", "is of no model that can be made here"]),
    # Rows
    ("train", {"dataset_name": "broken.jsonl"}, ["broken.jsonl, line 2 is not JSON", '{"prompt": "b"', "Mend it"]),
    ("evaluate", {"suite": "broken.jsonl"}, ["broken.jsonl, line 2 is not JSON"]),
    ("train", {"dataset_name": "empty.jsonl"}, ["empty.jsonl is empty", "a row a line"]),
    ("train", {"dataset_name": "blank.jsonl"}, ["nothing but blanks", "a row a line"]),
    ("train", {"dataset_name": "words.jsonl"}, ["words.jsonl, line 2 holds 'b'", "a row is a JSON object"]),
    ("train", {"dataset_name": "twice.jsonl"}, ["line 1 is not JSON", "'prompt' stands there twice"]),
    ("train", {"dataset_name": "list.json"}, ["list.json is one JSON list with a fault"]),
    ("train", {"dataset_name": "latin.jsonl"}, ["latin.jsonl, line 2 is not UTF-8", "Save it as UTF-8"]),
    ("train", {"dataset_name": "rows.parquet"}, ["rows.parquet is no Parquet file", "Give one that is"]),
    ("train", {"num_eval_prompts": "-3"}, ["`num_eval_prompts` is -3; it must lie in [0,", "Its default is 64"]),
    ("train", {"num_eval_prompts": "12"}, ["leaves nothing to train on", "Hold fewer out"]),
    # Of a target whose weights are cut off: they are not read before the rows are.
    *(
        (
            command,
            {rows: "images.jsonl", "teacher": "cut"},
            ["Row 0", "parts of type image", "text alone", "Drop"],
        )
        for command, rows in (("train", "dataset_name"), ("evaluate", "suite"), ("trace", "suite"))
    ),
    # Suites
    ("evaluate", {"suite": "gms8k"}, ["no suite 'gms8k'", "Did you mean gsm8k?"]),
    ("trace", {"suite": "humanevl"}, ["no suite 'humanevl'", "Did you mean humaneval?"]),
    ("evaluate", {"suite": "pocket,"}, ["`suite` is ''; it must not be empty"]),
    ("evaluate", {"suite": "pocket-kind"}, ["no suite 'pocket-kind'", "Suites of pocket tasks"]),
    ("evaluate", {"num_prompts": "0"}, ["`num_prompts` is 0; it must lie in [1,"]),
    # Values
    *(
        (command, {"dtype": dtype}, [f"`dtype` is '{dtype}'; it must be one of auto, float32, bfloat16, float16"])
        for command in ("evaluate", "trace")
        for dtype in ("fp16", "half", "float64", "")
    ),
    ("evaluate", {"dtype": "fp16"}, ["Did you mean float16?"]),
    ("export", {"_": ["drafter"], "output_dir": "new", "format": ANY_KIND, "dtype": "fp16"}, ["`dtype` is 'fp16'"]),
    ("evaluate", {"batch_size": "0"}, ["`batch_size` is 0; it must lie in [1, 65536]. Its default is 16"]),
    ("trace", {"batch_size": "0"}, ["`batch_size` is 0"]),
    (
        "evaluate",
        {"temperature": "-1"},
        ["`temperature` is -1.0; it must be 0, or lie in [0.0001, 100] (0 is greedy)"],
    ),
    ("evaluate", {"temperature": "nan"}, ["`temperature` is nan; it must be a finite number"]),
    ("trace", {"max_new_tokens": "-5"}, ["`max_new_tokens` is -5; it must lie in [1,"]),
    ("train", {"max_completion_length": "-5"}, ["`max_completion_length` is -5; it must lie in [2,"]),
    ("train", {"learning_rate": "1e6"}, ["`learning_rate` is 1000000.0; it must lie in [0, 10]"]),
    ("train", {"optim": "adamw_bnb_8bit", "optim_args": "x"}, ["`optim_args` is 'x'; it must be name=value pairs"]),
    ("train", {"optim": "grokadamw"}, ["`optim` is 'grokadamw'", "install grokadamw", "or choose adamw_torch"]),
    ("train", {"lr_scheduler_kwargs": '{"waves": 2}'}, ["`lr_scheduler_kwargs` {'waves': 2}", "Correct"]),
    ("train", {"model_init_kwargs": '{"dtyp": "auto"}'}, ["`model_init_kwargs`", "'dtyp'", "Did you mean dtype?"]),
    ("train", {"model_init_kwargs": "{dtype"}, ["`model_init_kwargs` is '{dtype', which is not JSON"]),
    ("train", {"teacher_model_init_kwargs": '{"dtype": "fp16"}'}, ["'dtype' = 'fp16'", "Did you mean float16?"]),
    ("train", {"teacher_model_init_kwargs": '{"wings": 2}'}, ["target", "wings", "`teacher_model_init_kwargs`"]),
    ("train", {"chat_template_kwargs": '{"tokenize": 1}'}, ["must not hold 'tokenize', which is set"]),
    ("evaluate", {"chat_template_kwargs": "[]"}, ["`chat_template_kwargs` is []", "must be a mapping"]),
    ("train", {"rollout_source": "server", "server_url": "localhost:8"}, ["must be an address such as http://"]),
    ("train", {"fp16": "true"}, ["fp16=True, but there is no GPU", "set bf16=True"]),
    ("train", {"report_to": "tensorbord"}, ["`report_to` is 'tensorbord'", "Did you mean tensorboard?"]),
    ("train", {"report_to": "clearml"}, ["clearml cannot be used here", "Install it"]),
    ("train", {"eval_strategy": "steps", "num_eval_prompts": "0"}, ["no `eval_dataset`", "set eval_strategy to 'no'"]),
    ("train", {"use_peft": "true", "lora_r": "0"}, ["`lora_r` is 0; it must lie in [1,"]),
    (
        "train",
        {"use_peft": "true", "lora_target_modules": "wing", "max_completion_length": "8"},
        ["takes no adapter", "--lora_target_modules"],
    ),
    ("train", {"load_in_8bit": "true", "load_in_4bit": "true"}, ["both true", "Choose one"]),
    ("plan", {"device_memory": "-1"}, ["`device_memory` is -1.0; it must lie in (0,"]),
    # Where things go, and where options come from
    ("trace", {"output_file": "prompts.jsonl/trace.html"}, ["cannot be written to", "Give a folder"]),
    ("evaluate", {"output_dir": "prompts.jsonl/out"}, ["cannot be written to", "Give a folder"]),
    ("train", {"output_dir": "prompts.jsonl/out"}, ["cannot be written to", "Give a folder"]),
    ("train", {"dataset_name": "nothing"}, ["folder without data files", "Give one with"]),
    ("train", {"config": "syntax.yaml"}, ["syntax.yaml, line 3 is not YAML", "Write a line an option"]),
    ("train", {"config": "nowhere.yaml"}, ["nowhere.yaml is not a file here"]),
]


@pytest.mark.parametrize(
    ("command", "options", "words"), MISTAKES, ids=[f"{command}-{options}" for command, options, _ in MISTAKES]
)
def test_a_mistake_is_told_in_one_line(place, capsys, command, options, words):
    with pytest.raises(SystemExit) as exit_:
        main(words_of(command, place, dict(options)))
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("draft-opd: error: ")]
    assert out == "" and len(told) == 1 and err.endswith(told[0] + "\n"), err
    assert "Traceback" not in err and all(word in told[0] for word in words), told[0]


def test_a_server_that_is_down_is_told_in_one_line(place, capsys):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://me:secret@127.0.0.1:{nobody.getsockname()[1]}"
        options = {"rollout_source": "server", "server_url": url, "server_max_retries": 0, "output_dir": "served"}
        options |= {"num_eval_prompts": 0, "report_to": "none", "per_device_train_batch_size": 2}
        options |= {"max_completion_length": 8}
        with pytest.raises(SystemExit) as exit_:
            main(words_of("train", place, options))
    err = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "did not answer" in err.splitlines()[-1] and "Check that the server runs" in err.splitlines()[-1]
    assert "secret" not in err


def test_bitsandbytes_that_is_missing_is_told_before_loading(place, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from draft_opd_trl.commands.options import QuantizationArguments

    with pytest.raises(OSError, match="`load_in_4bit` is true, but bitsandbytes.*pip install bitsandbytes"):
        QuantizationArguments(load_in_4bit=True).quantization_config()
