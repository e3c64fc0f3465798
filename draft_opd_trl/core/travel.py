"""The code that travels with a drafter's folder: the very modules that run here, as files of one flat folder.

transformers takes code along with a checkpoint only from a single folder, and follows `from .sibling import` there. So
relative imports of any depth are written as those of a sibling. What stands under `if TYPE_CHECKING:` never runs, and
stays behind with all that only it imports. An import that cannot be carried is an error here, not a folder that fails
elsewhere. Knows no drafters.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _fault(node: ast.AST, package: str, top_level: list[ast.stmt]) -> str | None:
    """Why an import cannot be carried."""
    names = [alias.name for alias in getattr(node, "names", [])]
    called = getattr(node.func, "attr", getattr(node.func, "id", None)) if isinstance(node, ast.Call) else None
    if {"import_module", "__import__"} & {called, *names}:
        return "it imports by name"
    if isinstance(node, ast.Call):
        return None
    if isinstance(node, ast.ImportFrom) and node.level:
        if node not in top_level:
            return "a relative import must stand at the top level of its module"
        if node.module is None or "*" in names:
            return "a relative import must name its module and what it takes of it"
        return None
    roots = {name.partition(".")[0] for name in ([node.module] if isinstance(node, ast.ImportFrom) else names)}
    stays = {package.partition(".")[0], __name__.partition(".")[0]}
    return "its own package must be imported relatively" if roots & stays else None


def _carried(module: str, source: str) -> tuple[str, list[str]]:
    """
    A module's source as it travels, and the modules that it imports relatively.

    Raises:
        `ImportError`: An import cannot be carried, by file and line.
    """
    package = module.rpartition(".")[0]
    body = ast.parse(source).body
    left = [node for node in body if _is_for_type_checkers(node) and not node.orelse]
    kept = [node for node in body if node not in left]
    lines, siblings = source.splitlines(keepends=True), []

    for node in (inner for outer in kept for inner in ast.walk(outer)):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        fault = _fault(node, package, kept)
        if fault is None and isinstance(node, ast.ImportFrom) and node.level:
            written, line = f"from {'.' * node.level}{node.module} import ", lines[node.lineno - 1]
            sibling = resolve_name("." * node.level + node.module, package)
            siblings.append(sibling)
            lines[node.lineno - 1] = f"from .{sibling.rpartition('.')[2]} import {line.removeprefix(written)}"
            if not line.startswith(written):
                fault = f"it must be written `{written}…`"
            elif hasattr(sys.modules[sibling], "__path__"):
                fault = f"{sibling} is a package: import from its modules"
        if fault:
            raise ImportError(f"{module}, line {node.lineno}, cannot travel with a drafter's folder: {fault}.")
    for node in left:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines), siblings


def travelling_code(module: str) -> dict[str, str]:
    """
    The code that a drafter class needs, as files of one flat folder.

    Args:
        module (`str`): Name of the module that holds the class, which has been imported.

    Returns:
        Sources by file name; none of a module outside of any package, such as a script, whose imports are absolute.

    Raises:
        `ImportError`: An import cannot be carried, or two modules would be one file.
    """
    carried, waiting, files = set(), [module] if "." in module else [], {}
    while waiting:
        name = waiting.pop()
        if name in carried:
            continue
        file = f"{name.rpartition('.')[2]}.py"
        if file in files:
            raise ImportError(f"{name} cannot travel with {module}: another module is called {file}. Rename one.")
        source = Path(sys.modules[name].__file__).read_text(encoding="utf-8")
        files[file], siblings = _carried(name, source)
        carried.add(name)
        waiting += siblings
    return files
