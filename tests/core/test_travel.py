"""Code on its way into a flat folder: what is carried, what is left behind, and what is refused."""

import importlib
import itertools
import re
import subprocess
import sys

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from draft_opd_trl.core.travel import travelling_code


HEAD = "from __future__ import annotations\n"
# What a drafter of a house with rooms in folders may look like.
HOUSE = {
    "core/records.py": "from dataclasses import dataclass\n\n@dataclass\nclass Blocks:\n    size: int\n",
    "core/deep/sums.py": "from ..records import Blocks\n\ndef total(all):\n    return sum(b.size for b in all)\n",
    "drafters/heads/base.py": "from ...core.records import Blocks\n\nclass Base:\n    start = Blocks(1)\n",
    "drafters/mine.py": f"""{HEAD}from math import pi
from typing import TYPE_CHECKING

from ..core.deep.sums import total
from ..core.records import (
    Blocks,
)
from .heads.base import Base


if TYPE_CHECKING:
    from ..core.target import Target
    from ..gone import nothing


class Mine(Base):
    def all(self, target: Target) -> float:
        return pi * total([Blocks(2), self.start])
""",
}
_count = itertools.count()


@pytest.fixture
def build(tmp_path, monkeypatch):
    """`build(**files)`: a package of these and of `HOUSE`, imported; gives the name of its drafter's module."""
    name = f"house{next(_count)}"
    monkeypatch.syspath_prepend(str(tmp_path))

    def made(changed=None):
        for file, source in {**HOUSE, **(changed or {})}.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source.replace("{house}", name))
        importlib.import_module(f"{name}.drafters.mine")
        return f"{name}.drafters.mine"

    yield made
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def test_modules_of_any_depth_become_siblings(build, tmp_path):
    files = travelling_code(build())
    assert files.keys() == {"mine.py", "sums.py", "records.py", "base.py"}
    assert files["base.py"] == HOUSE["drafters/heads/base.py"].replace("...core.records", ".records")
    assert re.findall(r"^from \.\S+ import", files["mine.py"], flags=re.M) == [
        "from .sums import",
        "from .records import",
        "from .base import",
    ]
    # Whole where the package is not, and transformers finds the same files.
    folder = tmp_path / "flat"
    folder.mkdir()
    for file, source in files.items():
        (folder / file).write_text(source)
    found = {*get_relative_import_files(folder / "mine.py"), str(folder / "mine.py")}
    assert found == {str(folder / file) for file in files}
    job = "from flat.mine import Mine; print(Mine().all(None))"
    done = subprocess.run([sys.executable, "-c", job], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(3 * 3.14159265)


def test_what_is_for_type_checkers_stays_behind(build):
    source = travelling_code(build())["mine.py"]
    assert "TYPE_CHECKING:" not in source and "gone" not in source
    assert source.endswith(HOUSE["drafters/mine.py"].partition("nothing\n")[2])


MINE = HOUSE["drafters/mine.py"].removeprefix(HEAD)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import {house}.core.records\n", "its own package must be imported relatively"),
        ("from {house}.core import records\n", "its own package must be imported relatively"),
        ("try:\n    from .heads.base import x\nexcept ImportError:\n    x = 1\n", "must stand at the top level"),
        ("def f():\n    from ..core import records\n", "must stand at the top level"),
        ("TYPE_CHECKING = 0\nif TYPE_CHECKING:\n    pass\nelse:\n    from .heads.base import Base\n", "top level"),
        ("from ..core.records import *\n", "name its module and what it takes"),
        ("from . import heads\n", "name its module and what it takes"),
        ("from ..core import records\n", "core is a package: import from its modules"),
        ("import importlib\nx = importlib.import_module('json')\n", "imports by name"),
        ("from importlib import import_module as load\n", "imports by name"),
        ("x = __import__('json')\n", "imports by name"),
        ("from  ..core.records import Blocks\n", "must be written `from ..core.records import"),
        ("x = 1; from ..core.records import Blocks\n", "must be written `from ..core.records import"),
    ],
)
def test_an_import_that_cannot_be_carried_is_an_error(build, source, why):
    """And says where."""
    module = build({"drafters/mine.py": HEAD + source + MINE})
    with pytest.raises(ImportError, match=rf"{module}, line \d+, cannot travel .*{re.escape(why)}"):
        travelling_code(module)


def test_an_import_that_cannot_be_carried_two_modules_on(build):
    module = build({"core/records.py": f"def f():\n    from .deep import sums\n{HOUSE['core/records.py']}"})
    with pytest.raises(ImportError, match=r"core\.records, line 2, cannot travel"):
        travelling_code(module)


def test_two_modules_of_one_name(build):
    module = build({"core/base.py": "x = 1\n", "drafters/mine.py": f"{HEAD}from ..core.base import x\n{MINE}"})
    with pytest.raises(ImportError, match=r"another module is called base.py"):
        travelling_code(module)
