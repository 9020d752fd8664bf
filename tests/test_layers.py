"""The layers of the package: a package imports only from lower layers and from itself, and no imports form a cycle.

Imports inside functions and under `TYPE_CHECKING` count: a package that names another package depends on it.
`fledge/__init__.py` is outside the layers. It may import from any package, but only inside functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

LAYERS = (  # lowest first; packages on the same layer never import each other
    {"core", "native"},
    {"kernels", "tokenizer"},
    {"models", "data"},
    {"checkpoint"},
    {"engine", "train"},
    {"server", "evals", "music", "vision"},
    {"bench", "diagnostics"},
    {"cli"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
WITHOUT_TORCH = {"tokenizer"}
TORCH_ONLY_IN_FUNCTIONS = {"core"}
TOP_LEVEL_FILES = {"__init__.py", "__main__.py"}


def lazy_nodes(tree: ast.Module) -> set[int]:
    """ids of the nodes inside functions and inside `if TYPE_CHECKING:`. Importing the module does not run them."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"))
    ]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def find_imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, is_lazy) of every import. Relative imports start from `package`."""
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


def describe_violation(package: str, name: str, is_lazy: bool) -> str | None:
    """Why `package` (or a top-level file) may not import `name`; None if the import is allowed."""
    top, _, rest = name.partition(".")
    if top in ("torch", "triton"):
        if package in WITHOUT_TORCH or (package in TORCH_ONLY_IN_FUNCTIONS and not is_lazy):
            return f"{package} imports {top}"
        return None
    if top != "fledge" or rest == "__version__":
        return None
    target = rest.split(".")[0]
    if target not in LEVEL:
        return f"{package} imports {name}: not a known package"
    if package == "__main__.py" or (package == "__init__.py" and (is_lazy or target == "core")):
        return None
    if package == "__init__.py":
        return f"fledge/__init__.py imports {name} outside a function"
    if target != package and LEVEL[target] >= LEVEL[package]:
        return f"{package} (L{LEVEL[package]}) imports {target} (L{LEVEL[target]})"
    return None


def find_violations(root: Path) -> list[str]:
    """Every broken rule below the package folder `root`, as `file:line: reason`."""
    violations = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        package = file.parts[0]
        if package not in LEVEL and package not in TOP_LEVEL_FILES:
            violations.append(f"{file}: {package} is not a known package")
            continue
        dotted = ".".join(("fledge", *file.parts[:-1]))
        for line, name, is_lazy in find_imports(ast.parse(path.read_text(encoding="utf-8")), dotted):
            if reason := describe_violation(package, name, is_lazy):
                violations.append(f"{file}:{line}: {reason}")
    return violations


@lru_cache
def module_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports, for every module below the package folder `root`."""
    paths = {}
    for path in root.rglob("*.py"):
        parts = ("fledge", *path.relative_to(root).with_suffix("").parts)
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = [name for _, name, _ in find_imports(ast.parse(path.read_text(encoding="utf-8")), package)]
        targets = {name if name in paths else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & paths.keys()) - {module}
    del graph["fledge"]
    return {module: targets - {"fledge"} for module, targets in graph.items()}


def folder_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Sub-package -> the sibling sub-packages that its modules import, at any depth."""
    folders: dict[str, set[str]] = {}
    for module, targets in graph.items():
        for target in targets:
            source, imported = module.split("."), target.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(source, imported, strict=False)) if a != b), None)
            if shared is None:
                continue  # a package and a module inside it
            left, right = ".".join(source[: shared + 1]), ".".join(imported[: shared + 1])
            if is_folder(left, graph) and is_folder(right, graph):
                folders.setdefault(left, set()).add(right)
    return folders


def is_folder(name: str, graph: Mapping[str, set[str]]) -> bool:
    return any(module.startswith(f"{name}.") for module in graph)


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of one cycle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_point_down() -> None:
    assert find_violations(REPO / "fledge") == []


def test_no_module_imports_itself_through_others() -> None:
    assert find_cycle(module_graph(REPO / "fledge")) == []


def test_sub_packages_do_not_import_each_other_in_a_cycle() -> None:
    assert find_cycle(folder_graph(module_graph(REPO / "fledge"))) == []


ALLOWED = {
    "core/device.py": "if TYPE_CHECKING:\n    import torch\ndef choose():\n    import torch",
    "models/finch.py": "import torch\nfrom fledge.kernels import wkv\nfrom . import state",
    "models/state.py": "",
    "kernels/wkv.py": "",
    "engine/llm.py": "from fledge import __version__\nfrom fledge.models import build",
    "__init__.py": "from fledge.core.errors import FledgeError\ndef load():\n    from fledge.engine import LLM",
    "__main__.py": "from fledge.cli.main import run",
}


def write_package(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


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
        ("models/a.py", "from fledge import load", "not a known package"),
        ("models/a.py", "import fledge", "not a known package"),
        ("models/a.py", "from fledge.attic import thing", "not a known package"),
        ("attic/a.py", "", "attic is not a known package"),
        ("stray.py", "", "stray.py is not a known package"),
        ("core/a.py", "import torch", "core imports torch"),
        ("tokenizer/a.py", "if TYPE_CHECKING:\n    import torch", "tokenizer imports torch"),
        ("tokenizer/a.py", "def f():\n    from torch import nn", "tokenizer imports torch"),
        ("__init__.py", "from fledge.engine import LLM", "fledge/__init__.py imports fledge.engine.LLM"),
    ],
)
def test_the_check_finds_each_violation(tmp_path: Path, file: str, source: str, expected: str) -> None:
    write_package(tmp_path, {**ALLOWED, file: source})
    violations = find_violations(tmp_path)
    assert len(violations) == 1 and violations[0].startswith(file) and expected in violations[0]


def test_the_check_accepts_allowed_imports(tmp_path: Path) -> None:
    write_package(tmp_path, ALLOWED)
    assert find_violations(tmp_path) == []
    assert find_cycle(module_graph(tmp_path)) == []


def test_the_check_finds_a_cycle_of_modules(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {
            **ALLOWED,
            "models/a.py": "def f():\n    from fledge.models import b",
            "models/b.py": "from fledge.models.deep.c import x",
            "models/deep/c.py": "if TYPE_CHECKING:\n    from ..a import f",
        },
    )
    assert set(find_cycle(module_graph(tmp_path))) == {"fledge.models.a", "fledge.models.b", "fledge.models.deep.c"}


def test_the_check_finds_a_cycle_of_sub_packages(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {
            **ALLOWED,
            "engine/one/a.py": "from fledge.engine.two.b import x",
            "engine/one/d.py": "",
            "engine/two/b.py": "",
            "engine/two/c.py": "from fledge.engine.one.d import y",
        },
    )
    graph = module_graph(tmp_path)
    assert find_cycle(graph) == []
    assert set(find_cycle(folder_graph(graph))) == {"fledge.engine.one", "fledge.engine.two"}
