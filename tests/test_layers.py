"""The layers of the package: a room imports from strictly lower layers and from itself, nothing else.

Lazy imports, those inside functions or for type checkers only, count: a room that names another one knows it.
The front door, fledge/__init__.py, is outside the layers: it may import any room, but only lazily.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

LAYERS = (  # lowest first; rooms of one layer do not know each other
    {"core", "native"},
    {"kernels", "tokenizer"},
    {"models", "data"},
    {"checkpoint"},
    {"engine", "train"},
    {"server", "evals", "music", "vision"},
    {"bench", "diagnostics"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
TORCH_NOWHERE = {"tokenizer"}
TORCH_LAZILY = {"core"}
TOP_LEVEL_FILES = {"__init__.py", "__main__.py"}


def lazy_nodes(tree: ast.Module) -> set[int]:
    """ids of the nodes inside functions and inside `if TYPE_CHECKING:`; importing the module does not run them."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"))
    ]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, lazy?) of every import; `package` is what relative imports start from."""
    lazy = lazy_nodes(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for name in names:
            yield node.lineno, name, id(node) in lazy


def complaint(room: str, name: str, lazy: bool) -> str | None:
    """Why `room` (a room or a top-level file) may not import `name`, or None where it may."""
    top, _, rest = name.partition(".")
    if top in ("torch", "triton"):
        if room in TORCH_NOWHERE or (room in TORCH_LAZILY and not lazy):
            return f"{room} imports {top}"
        return None
    if top != "fledge" or rest == "__version__":
        return None
    target = rest.split(".")[0]
    if target not in LEVEL:
        return f"{room} imports {name}: not one of the rooms"
    if room == "__main__.py" or (room == "__init__.py" and (lazy or target == "core")):
        return None
    if room == "__init__.py":
        return f"the front door imports {name}, and not lazily"
    if target != room and LEVEL[target] >= LEVEL[room]:
        return f"{room} (L{LEVEL[room]}) imports {target} (L{LEVEL[target]})"
    return None


def violations(root: Path) -> list[str]:
    """Every broken rule below `root`, a package folder, as `file:line: what is wrong`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        room = where.parts[0]
        if room not in LEVEL and room not in TOP_LEVEL_FILES:
            found.append(f"{where}: {room} is not one of the rooms")
            continue
        package = ".".join(("fledge", *where.parts[:-1]))
        for line, name, lazy in imports(ast.parse(path.read_text(encoding="utf-8")), package):
            if problem := complaint(room, name, lazy):
                found.append(f"{where}:{line}: {problem}")
    return found


def test_imports_point_down() -> None:
    assert violations(REPO / "fledge") == []


ALLOWED = {
    "core/device.py": "if TYPE_CHECKING:\n    import torch\ndef choose():\n    import torch",
    "models/finch.py": "import torch\nfrom fledge.kernels import wkv\nfrom . import state",
    "engine/llm.py": "from fledge import __version__\nfrom fledge.models import build",
    "__init__.py": "from fledge.core.errors import FledgeError\ndef load():\n    from fledge.engine import LLM",
    "__main__.py": "from fledge.cli.main import run",
}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("models/a.py", "from fledge.engine import LLM", "models (L2) imports engine (L4)"),
        ("models/a.py", "from fledge import engine", "models (L2) imports engine (L4)"),
        ("models/a.py", "def f():\n    import fledge.train.loop", "models (L2) imports train (L4)"),
        ("models/a.py", "from ..data import pack", "models (L2) imports data (L2)"),
        ("models/deep/a.py", "from ...data import pack", "models (L2) imports data (L2)"),
        ("models/a.py", "importlib.import_module('fledge.data.pack')", "models (L2) imports data (L2)"),
        ("models/a.py", "if TYPE_CHECKING:\n    from fledge.train import loop", "models (L2) imports train (L4)"),
        ("models/a.py", "from fledge import load", "not one of the rooms"),
        ("models/a.py", "import fledge", "not one of the rooms"),
        ("models/a.py", "from fledge.attic import thing", "not one of the rooms"),
        ("attic/a.py", "", "attic is not one of the rooms"),
        ("stray.py", "", "stray.py is not one of the rooms"),
        ("core/a.py", "import torch", "core imports torch"),
        ("tokenizer/a.py", "if TYPE_CHECKING:\n    import torch", "tokenizer imports torch"),
        ("tokenizer/a.py", "def f():\n    from torch import nn", "tokenizer imports torch"),
        ("__init__.py", "from fledge.engine import LLM", "the front door imports fledge.engine.LLM"),
    ],
)
def test_checker_catches(tmp_path: Path, file: str, source: str, expected: str) -> None:
    for name, text in {**ALLOWED, file: source}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(file) and expected in found[0]


def test_checker_accepts_what_is_allowed(tmp_path: Path) -> None:
    for name, text in ALLOWED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []
