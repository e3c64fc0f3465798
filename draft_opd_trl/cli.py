"""The `draft-opd` command line: finds a command's module, reads its options, runs it, prints its result once.

Holds what all commands share: help, exit codes, where output goes. Knows no command's own options and does no work.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import errno
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import yaml
from trl import TrlParser

from .commands.recipes import config_file
from .core.checks import nearest
from .core.completion import SCRIPTS, completion_script
from .core.errors import InputError, UserError
from .core.files import REMEDIES, refusal_of
from .core.terminal import as_text, grid


# Each module has `ARGUMENTS`, dataclasses of options; `run(*parsed) -> dict`; `show(result) -> str`; and may have
# `BARE`: options that may stand without a value, and the value they then have.
COMMANDS = {
    "init": "draft_opd_trl.commands.init",
    "train": "draft_opd_trl.commands.train",
    "evaluate": "draft_opd_trl.commands.evaluate",
    "trace": "draft_opd_trl.commands.trace",
    "plan": "draft_opd_trl.commands.plan",
    "export": "draft_opd_trl.commands.export",
    "inspect": "draft_opd_trl.commands.inspect",
    "recipes": "draft_opd_trl.commands.recipes",
    "texts": "draft_opd_trl.commands.texts",
}
A_BUG = (
    "draft-opd: this is a fault of draft_opd_trl, not of what you gave it. Please report it with the lines above and "
    "the command."
)


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _leave_together() -> None:
    """Of several ranks, one that is gone while another still talks to it can make that one abort."""
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def _fail(message: str, code: int) -> NoReturn:
    if _is_main_process():
        print(f"draft-opd: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def machine_fault(error: BaseException | None) -> str | None:
    """
    What the machine refused, in one line with a remedy, if that is what went wrong.

    Args:
        error (`BaseException`): Errors that it was raised from are looked at too, as libraries wrap the system's.
    """
    while error is not None:
        number = refusal_of(error)
        if number is not None:
            place = f"{error.filename}: " if getattr(error, "filename", None) else ""
            return f"{place}{os.strerror(number)}. {REMEDIES[number]}"
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            return (
                f"Out of memory ({str(error)[:200]}). Lower the batch sizes; `draft-opd plan` says what frees memory."
            )
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            return f"A checkpoint could not be written ({str(error)[:200]}). {REMEDIES[errno.ENOSPC]}"
        error = error.__cause__ or error.__context__
    return None


def _check_yaml(file: str) -> None:
    """
    Raises:
        `ValueError`: It is no YAML mapping of options.
    """
    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"--config {file} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"--config {file}{where} is not YAML ({getattr(error, 'problem', None) or error}). Write a line an "
            "option, such as `learning_rate: 0.0003`."
        ) from error
    if not isinstance(options, dict):
        kind = "nothing" if options is None else f"a {type(options).__name__}"
        raise InputError(f"--config {file} holds {kind}. Write a line an option, such as `learning_rate: 0.0003`.")
    if not isinstance(options.get("env", {}), dict):
        raise InputError(f"--config {file} has an `env` that is no mapping of names to values. Write it as one.")
    for name in options:
        if not isinstance(name, str):
            raise InputError(f"--config {file} has {name!r} where the name of an option must stand. Write it as text.")


def _let_stand_bare(parser: argparse.ArgumentParser, name: str, value: object) -> None:
    """Let an option stand without a value, and then be `value`."""
    action = parser._option_string_actions[f"--{name}"]
    action.nargs, action.const = "?", value


class CommandParser(TrlParser):
    """
    TRL's parser (dataclasses, `--config file.yaml`) with errors of one line that name the nearest option.

    Args:
        name (`str`): The command.
        command (module): With `ARGUMENTS` and a docstring whose first line is the help.
        all_options (`bool`, *optional*, defaults to `False`): Show inherited options in the help too.
    """

    def __init__(self, name: str, command: ModuleType, all_options: bool = False) -> None:
        super().__init__(
            command.ARGUMENTS,
            prog=f"draft-opd {name}",
            description=command.__doc__,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        for name, value in getattr(command, "BARE", {}).items():
            _let_stand_bare(self, name, value)
        places = [f"<{action.dest}>" for action in self._actions if not action.option_strings]
        self.usage = " ".join([self.prog, *places, "[options]"])
        self.add_argument("--config", metavar="FILE", help="YAML file with any of these options, or a recipe.")
        self.add_argument("--json", action="store_true", help="Print the result as one JSON document.")
        self.add_argument("--traceback", action="store_true", help="Show where an error comes from.")
        if not all_options:
            self._hide_inherited(command.ARGUMENTS)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if field.metadata.get("positional"):
            optional = field.default is not dataclasses.MISSING
            given = {"nargs": "?", "default": field.default} if optional else {}
            if typing.get_origin(field.type) is list:
                given = {"nargs": "+"}
            parser.add_argument(field.name, help=field.metadata["help"], **given)
        else:
            TrlParser._parse_dataclass_field(parser, field)
            if field.type == bool | None:  # as other switches may; of these are --bf16 and --gradient_checkpointing
                _let_stand_bare(parser, field.name, True)

    def _hide_inherited(self, dataclass_types: Sequence[type]) -> None:
        """Leave out of the help what other packages' classes bring: hundreds of options of `TrainingArguments`."""
        for dataclass_type in dataclass_types:
            bases = [base for base in dataclass_type.__mro__ if base.__module__.startswith(__package__)]
            own = {name for base in bases for name in base.__annotations__}
            inherited = {field.name for field in dataclasses.fields(dataclass_type)} - own
            for action in self._actions:
                if action.dest in inherited:
                    action.help = argparse.SUPPRESS
            if inherited:
                self.epilog = (
                    f"And {len(inherited)} options of transformers.TrainingArguments, such as --output_dir, "
                    "--max_steps and --save_steps; --help_all lists them."
                )

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (`{self.prog} --help` lists the options.)", 2)

    def _check_option(self, word: str, where: str = "") -> None:
        option = word.split("=")[0]
        if option not in self._option_string_actions:
            known = [option for option in self._option_string_actions if "-" not in option[2:]]
            self.error(f"unknown option {option}{where}.{nearest(option, known)}")

    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]!r} belongs to no option.")
        return parsed, unknown

    def set_defaults_with_config(self, **config) -> list[str]:
        defaults = {}
        for key, value in config.items():
            self._check_option(f"--{key}", " in the --config file")
            action = self._option_string_actions[f"--{key}"]
            # argparse takes a default as it stands, and a string for a list of its letters.
            defaults[action.dest] = [value] if action.nargs == "+" and not isinstance(value, list) else value
        return super().set_defaults_with_config(**defaults)

    def parse(self, argv: Sequence[str]) -> list:
        """Instances of the command's dataclasses, then a namespace with `json` and `traceback`."""
        # TrlParser knows `--config FILE` as two words only.
        words = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if words and words[-1] == "--config":
            self.error("--config needs a YAML file.")
        if words.count("--config") > 1:
            self.error("--config is given more than once. Put all of it into one file.")
        if "--config" in words:
            place = words.index("--config") + 1
            words[place] = config_file(words[place])
            _check_yaml(words[place])
        # Before argparse, which would speak of missing options first when one of them is misspelt.
        for word in words:
            if word.startswith("--"):
                self._check_option(word)
        return list(self.parse_args_and_config(words))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option without its twin in hyphens, its value once, and no empty defaults."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = ", ".join(word for word in action.option_strings if "-" not in word[2:])
        if not options or action.nargs == 0:
            return options or super()._format_action_invocation(action)
        return f"{options} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        # A default may be one that only shows itself as what it stands for.
        empty = str(action.default) in ("None", "False")
        return action.help if empty else super()._get_help_string(action)


def _overview() -> str:
    """All commands with the first lines of their docstrings, read without importing them."""
    lines = []
    for name, module in COMMANDS.items():
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        lines.append(["", name, ast.get_docstring(ast.parse(source)).splitlines()[0]])
    lines.append(["", "completion", "Print what lets a shell complete all of this: bash or zsh."])
    tail = "`draft-opd <command> --help` shows a command's options; `draft-opd --version` the version."
    return as_text("usage: draft-opd <command> [options]", "", "commands:", grid(lines), "", tail)


def _completion(words: Sequence[str]) -> str:
    """
    The script with which a shell completes commands, options and their values.

    Raises:
        `ValueError`: Of no shell that is known.
    """
    if list(words) not in [[shell] for shell in SCRIPTS]:
        raise InputError(f"completion is for one shell, {' or '.join(SCRIPTS)}, not {' '.join(words) or 'none'!r}.")
    commands = {}
    for name, module in COMMANDS.items():
        actions = CommandParser(name, importlib.import_module(module), all_options=True)._option_string_actions
        options = {word: actions[word].choices or () for word in sorted(actions) if "-" not in word[2:]}
        commands[name] = {word: list(map(str, choices)) for word, choices in options.items() if word != "-h"}
    return completion_script(words[0], "draft-opd", {**commands, "completion": dict.fromkeys(SCRIPTS, ())})


def _answer(name: str, words: Sequence[str]) -> str:
    """What a command prints."""
    command = importlib.import_module(COMMANDS[name])
    parser = CommandParser(name, command, all_options="--help_all" in words)
    if {"-h", "--help", "--help_all"} & set(words):
        return parser.format_help()
    *parsed, options = parser.parse(words)
    result = command.run(*parsed)
    return json.dumps(result, indent=2) if options.json else command.show(result)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Words of the command line; the process's own by default.

    Returns:
        0. Exits with 2 on an unknown command or option, with 1 on bad input or where the machine refuses. One line on
        stderr says why.

    Raises:
        `Exception`: A fault of ours, or of a library: with a traceback, and a note that asks to report it.
    """
    name, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"draft-opd {importlib.metadata.version(__package__)}")
        return 0
    if name not in (*COMMANDS, "completion"):
        _fail(f"unknown command {name!r}.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.", 2)
    traceback = "--traceback" in words
    try:
        # Whatever a library prints goes to stderr, so that stdout holds the result and nothing else.
        with contextlib.redirect_stdout(sys.stderr):
            text = _completion(words) if name == "completion" else _answer(name, words)
    except UserError as error:
        if traceback:
            raise
        _fail(str(error), 1)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", getattr(error, "code", 130))
    except Exception as error:
        told = machine_fault(error)
        if told is None:
            error.add_note(A_BUG)
        if told is None or traceback:
            raise
        _fail(told, 1)
    if _is_main_process():
        print(text)
    _leave_together()
    return 0


if __name__ == "__main__":
    sys.exit(main())
