"""The documentation against the code: names, options, targets and links that it mentions must exist."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from docstrings import parameters

import draft_opd_trl
from draft_opd_trl._trl_compat import _BaseConfig
from draft_opd_trl.cli import COMMANDS, CommandParser
from draft_opd_trl.commands.evaluate import EvaluateArguments
from draft_opd_trl.commands.options import PairArguments
from draft_opd_trl.commands.trace import TraceArguments
from draft_opd_trl.training.config import DraftOPDConfig


SOURCE = ROOT / "docs" / "source"
PACKAGE = ROOT / "draft_opd_trl"
PAGES = [ROOT / "README.md", *sorted(SOURCE.glob("*.md"))]

OUR_FIELDS = {field.name for field in dataclasses.fields(DraftOPDConfig)} - {
    field.name for field in dataclasses.fields(_BaseConfig)
}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def _code_blocks(text: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _without_code(_read(path)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _options(command: str) -> set[str]:
    """Options of a `draft-opd` command, as its parser knows them."""
    parser = CommandParser(command, importlib.import_module(COMMANDS[command]))
    return {option.removeprefix("--") for option in parser._option_string_actions} | {"help_all"}


def _quickstart_options() -> set[str]:
    module = ast.parse(_read(ROOT / "examples" / "quickstart.py"))
    arguments = next(node for node in module.body if getattr(node, "name", None) == "QuickstartArguments")
    return {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}


def test_architecture_draws_the_modules_that_there_are():
    """A line a folder, and under it a line a module; a folder's `__init__.py` may go unnamed."""
    drawn, folder = set(), ""
    for line in max(_code_blocks(_read(SOURCE / "architecture.md")), key=len).splitlines():
        if heading := re.match(r"(\w+/)\s", line):
            folder = heading[1]
        elif module := re.match(r"(  )?(\S+\.py)\s", line):
            drawn.add((folder if module[1] else "") + module[2])
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    unnamed = {module for module in there - drawn if not module.endswith("/__init__.py")}
    assert (drawn - there, unnamed) == (set(), set())


def test_settings_are_documented_in_their_order():
    documented = [name for name in parameters(inspect.getdoc(DraftOPDConfig)) if name in OUR_FIELDS]
    assert documented == [field.name for field in dataclasses.fields(DraftOPDConfig) if field.name in OUR_FIELDS]


def test_api_has_every_public_name():
    sections = re.findall(r"^### (\w+)\n.*?^\[\[autodoc\]\] (\w+)$", _read(SOURCE / "api.md"), flags=re.M | re.S)
    assert [heading for heading, _ in sections] == [name for _, name in sections]
    assert sorted(name for _, name in sections) == sorted(draft_opd_trl.__all__)


@pytest.mark.parametrize(
    "name", [name for name in draft_opd_trl.__all__ if name not in ("DRAFTERS", "DraftOPDConfig")]
)
def test_docstrings_name_every_parameter(name):
    value = getattr(draft_opd_trl, name)
    assert parameters(inspect.getdoc(value)) == list(inspect.signature(value).parameters)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(_read(page))):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(link)
    assert broken == []


def test_table_of_contents_lists_every_page():
    listed = re.findall(r"local: (\S+)", _read(SOURCE / "_toctree.yml"))
    assert sorted(listed) == sorted(page.stem for page in SOURCE.glob("*.md"))


def test_readme_commands_are_make_targets():
    commands = set(re.findall(r"\bmake (\w+)", " ".join(_code_blocks(_read(ROOT / "README.md")))))
    targets = set(re.findall(r"^(\w+):", _read(ROOT / "Makefile"), flags=re.MULTILINE))
    assert commands == {"quickstart", "test"}
    assert commands <= targets


def test_options_of_commands_exist():
    known = {command: _options(command) for command in COMMANDS}
    known["quickstart"] = _quickstart_options()
    for script in ("train", "quickstart"):
        known[script] |= {"config_file", "num_processes"}  # of `accelerate launch`
    unknown = []
    for page in PAGES:
        lines = "\n".join(_code_blocks(_read(page))).replace("\\\n", " ").splitlines()
        for command, options in known.items():
            for line in lines:
                if re.search(rf"examples/{command}\.py|(draft-opd|draft_opd_trl\.cli) {command}\b", line):
                    used = re.findall(r"(?<![\w-])--(\w+)", line)
                    unknown += [f"{page.name}: {command} --{option}" for option in used if option not in options]
        prose = re.findall(r"`--(\w+)", _without_code(_read(page)))
        everything = set.union(*known.values()) | {"help"}
        unknown += [f"{page.name}: --{option}" for option in prose if option not in everything]
    assert unknown == []


def test_issue_templates_ask_for_commands_that_exist():
    asked = []
    for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        assert isinstance(yaml.safe_load(_read(file)), dict), file.name
        asked += re.findall(r"`draft-opd (\w+) ([^`]*)`", " ".join(_read(file).split()))
    assert {command for command, _ in asked} == {"inspect", "evaluate"}
    for command, words in asked:
        assert set(re.findall(r"--(\w+)", words)) <= _options(command)


@pytest.mark.parametrize(("command", "arguments"), [("evaluate", EvaluateArguments), ("trace", TraceArguments)])
def test_every_option_is_in_its_table(command, arguments):
    table = _read(SOURCE / "cli.md").split(f"## {command}\n")[1].split("\n## ")[0]
    pair = {field.name for field in dataclasses.fields(PairArguments)}
    options = {field.name for field in dataclasses.fields(arguments)} - pair
    assert {option for option in options if f"`--{option}`" not in table} == set()
