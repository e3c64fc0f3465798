"""The `draft-opd` command line: exit codes, nearest matches, one result on stdout, YAML, ranks."""

import configparser
import dataclasses
import errno
import importlib
import json
import subprocess
import sys
import types

import pytest
from conftest import ROOT

import draft_opd_trl
from draft_opd_trl import cli
from draft_opd_trl.core.errors import InputError


@dataclasses.dataclass
class Base:
    inherited: int = dataclasses.field(default=1, metadata={"help": "From elsewhere."})


# As if another package had defined it.
Base.__module__ = "elsewhere"


@dataclasses.dataclass(kw_only=True)
class Arguments(Base):
    learning_rate: float = dataclasses.field(metadata={"help": "A rate.", "aliases": ["--lr"]})
    file: str = dataclasses.field(metadata={"help": "A file.", "positional": True})
    rows: int = dataclasses.field(default=3, metadata={"help": "Rows."})
    names: list[str] = dataclasses.field(default_factory=list, metadata={"help": "Names."})
    half: bool | None = dataclasses.field(default=None, metadata={"help": "Left open, or a switch."})

    def __post_init__(self):
        if self.rows < 0:
            raise InputError(f"`rows` is {self.rows};\nit must be positive.")


Arguments.__module__ = f"{cli.__package__}.commands.fake"


@pytest.fixture
def fake(monkeypatch):
    """A command that returns what it was given, after some noise."""

    def run(arguments):
        print("noise of a library")
        if arguments.file == "bug":
            raise RuntimeError("a bug")
        return dataclasses.asdict(arguments)

    module = types.ModuleType("fake_command", "Fake a run.\n\nMore about it.")
    module.ARGUMENTS, module.run, module.show = (Arguments,), run, lambda result: f"{result['rows']} rows"
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", "fake_command")
    return module


def _error(capsys, code, *words):
    """stderr of a command line that exits with `code`: one line, and nothing on stdout."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("draft-opd: error: ")
    return err


def test_a_command_shows_its_result_once(fake, capsys):
    assert cli.main(["fake", "a.txt", "--lr", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out == "3 rows\n"
    assert err == "noise of a library\n"


def test_json_is_all_of_stdout(fake, capsys):
    assert cli.main(["fake", "a.txt", "--learning-rate=0.5", "--rows", "4", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {
        "inherited": 1,
        "learning_rate": 0.5,
        "file": "a.txt",
        "rows": 4,
        "names": [],
        "half": None,
    }


def test_switches_may_stand_bare(fake, capsys):
    for words, half in [(["--half"], True), (["--half", "false"], False), (["--half=true"], True), ([], None)]:
        assert cli.main(["fake", "a.txt", *words, "--lr", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["half"] is half


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_switch_of_every_command_may_stand_bare(name):
    parser = cli.CommandParser(name, importlib.import_module(cli.COMMANDS[name]))
    yes = [action.dest for action in parser._actions if getattr(action.type, "__name__", "") == "string_to_bool"]
    for action in parser._actions:
        action.required = False
    values = vars(parser.parse_known_args([f"--{switch}" for switch in yes])[0])
    assert {switch: values[switch] for switch in yes} == dict.fromkeys(yes, True)


def test_several_files_by_their_places(fake, capsys):
    @dataclasses.dataclass
    class Files:
        files: list[str] = dataclasses.field(metadata={"help": "Files.", "positional": True})
        rows: int = dataclasses.field(default=3, metadata={"help": "Rows."})

    fake.ARGUMENTS, fake.run = (Files,), lambda arguments: vars(arguments)
    assert cli.main(["fake", "a.txt", "b.txt", "--rows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": ["a.txt", "b.txt"], "rows": 4}
    assert "files" in _error(capsys, 2, "fake", "--rows", "4")


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"draft-opd {draft_opd_trl.__version__}\n"


def test_completion_holds_every_command_with_its_options(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", {name: cli.COMMANDS[name] for name in ("inspect", "train")})
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "words='inspect train completion'" in script
    assert "'train --recipe') words='accepted_length auf default dpace lk paper sft'" in script
    options = next(line for line in script.splitlines() if line.strip().startswith("inspect) "))
    assert options.split("'")[1].split() == "--config --help --json --revision --target --traceback".split()
    assert " --learning_rate " in script and "--learning-rate" not in script
    for words in ([], ["fish"], ["bash", "zsh"]):
        assert "completion is for one shell, bash or zsh" in _error(capsys, 1, "completion", *words)


def test_yaml_gives_any_option_and_the_command_line_overrides_it(fake, capsys, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("lr: 0.25\nrows: 7\nnames: one\n")
    for words in (["--config", str(config)], [f"--config={config}"]):
        assert cli.main(["fake", "a.txt", *words, "--rows", "8", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["learning_rate"] == 0.25 and result["rows"] == 8 and result["names"] == ["one"]


def test_misspelt_words_get_the_nearest_and_exit_2(fake, capsys, tmp_path):
    assert "unknown command 'fka'. Did you mean fake?" in _error(capsys, 2, "fka")
    assert "unknown option --learnin_rate. Did you mean --learning_rate?" in _error(
        capsys, 2, "fake", "--learnin_rate", "1"
    )
    # A prefix is not an option either: `--row` could mean another one tomorrow.
    assert "unknown option --row. Did you mean --rows?" in _error(capsys, 2, "fake", "a.txt", "--lr=1", "--row=2")
    config = tmp_path / "recipe.yaml"
    config.write_text("learning_rat: 0.25\n")
    error = _error(capsys, 2, "fake", "a.txt", "--config", str(config))
    assert "unknown option --learning_rat in the --config file. Did you mean --learning_rate?" in error


def test_misuse_exits_2(fake, capsys):
    assert "'b.txt' belongs to no option" in _error(capsys, 2, "fake", "a.txt", "b.txt", "--lr", "1")
    assert "--learning_rate" in _error(capsys, 2, "fake", "a.txt")
    assert "invalid int value: 'x'" in _error(capsys, 2, "fake", "a.txt", "--lr", "1", "--rows", "x")
    assert "--config needs a YAML file" in _error(capsys, 2, "fake", "a.txt", "--config")


def test_bad_input_is_one_line_and_exits_1(fake, capsys):
    error = _error(capsys, 1, "fake", "a.txt", "--lr", "1", "--rows", "-1")
    assert "`rows` is -1; it must be positive." in error
    assert "nowhere.yaml is not a file here" in _error(capsys, 1, "fake", "a.txt", "--config", "nowhere.yaml")


def test_tracebacks_of_bad_input_on_request_and_of_bugs_always(fake):
    with pytest.raises(ValueError, match="must be positive"):
        cli.main(["fake", "a.txt", "--lr", "1", "--rows", "-1", "--traceback"])
    with pytest.raises(RuntimeError, match="a bug") as raised:
        cli.main(["fake", "bug", "--lr", "1"])
    assert "Please report it" in raised.value.__notes__[0]


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, ImportError, FileNotFoundError])
def test_a_bug_is_never_dressed_up_as_a_mistake(fake, kind):
    """Whatever Python calls it: only what says that the user can mend it is shown in one line."""

    def run(arguments):
        raise kind("ours")

    fake.run = run
    with pytest.raises(kind, match="ours") as raised:
        cli.main(["fake", "a.txt", "--lr", "1"])
    assert "fault of draft_opd_trl" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full", "out/model.bin"), ["out/model.bin", "No space left", "Free some space"]),
        (PermissionError(errno.EACCES, "no", "out"), ["out: Permission denied", "Change the permissions"]),
        (OSError(errno.EROFS, "ro", "out"), ["out: Read-only file system", "can be written to"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ["No space left", "Free some space"]),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), ["could not be written", "Free some space"]),
        (MemoryError(), ["Out of memory", "Lower the batch sizes"]),
    ],
)
def test_what_the_machine_refuses_is_one_line_with_a_remedy(fake, capsys, error, words):
    def run(arguments):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("wrapped by a library") from cause

    fake.run = run
    told = _error(capsys, 1, "fake", "a.txt", "--lr", "1")
    assert all(word in told for word in words), told


def test_yaml_that_cannot_be_read_is_one_line(fake, capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    for content, word in [
        ("rows: 3\nlr: [1, 2\nnames: a\n", "line 3 is not YAML"),
        ("a\tb: \t- 3\n\t-", "is not YAML"),
        ("", "holds nothing"),
        ("- rows\n", "holds a list"),
        ("3: 4\n", "has 3 where the name of an option must stand"),
        ("env: 3\n", "has an `env` that is no mapping"),
    ]:
        file.write_text(content)
        told = _error(capsys, 1, "fake", "a.txt", "--lr", "1", "--config", str(file))
        assert f"--config {file}" in told and word in told, told
    file.write_bytes(b"names: \xe9\n")
    assert "is not UTF-8" in _error(capsys, 1, "fake", "a.txt", "--lr", "1", "--config", str(file))
    assert "more than once" in _error(capsys, 2, "fake", "a.txt", "--config", "x.yaml", "--config", "y.yaml")


def test_other_ranks_print_nothing(fake, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_is_main_process", lambda: False)
    assert cli.main(["fake", "a.txt", "--lr", "1"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["fake", "a.txt", "--lr", "1", "--rows", "-1"])
    assert capsys.readouterr() == ("", "noise of a library\n")


def test_help_names_commands_and_hides_what_others_bring(fake, capsys, monkeypatch):
    assert cli.main(["fake", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: draft-opd fake <file> [options]")
    assert "Fake a run." in text and "--learning_rate, --lr LEARNING_RATE" in text
    assert "--learning-rate" not in text and "--inherited" not in text and "And 1 options of" in text
    assert cli.main(["fake", "--help_all"]) == 0
    assert "--inherited" in capsys.readouterr().out
    monkeypatch.delitem(cli.COMMANDS, "fake")
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.main([name, "--help_all"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: draft-opd {name}")


def test_the_overview_is_quick():
    """It imports no command, and so none of the libraries that take seconds."""
    code = "import sys; from draft_opd_trl.cli import main; main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_console_script_is_this_main():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert "draft-opd = draft_opd_trl.cli:main" in metadata["options.entry_points"]["console_scripts"]
