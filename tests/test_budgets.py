"""Limits on the size of files, functions and folders. Raising one is a visible change in this file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 8
FOLDER_FILES = 15

# Larger limits, each with its reason: "package/file.py" -> lines of the file; "package/file.py:function" -> lines of
# the function; "package/file.py:function()" -> its parameters; "package/" -> files. An entry that is not needed fails
# the test.
EXCEPTIONS: dict[str, int] = {}


def sizes(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name as in EXCEPTIONS, size, limit) of every folder, file and function below `root`."""
    for folder in (root, *sorted(path for path in root.rglob("*") if path.is_dir())):
        yield f"{folder.relative_to(root).as_posix()}/", len(list(folder.glob("*.py"))), FOLDER_FILES
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        yield name, len(text.splitlines()), FILE_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{name}:{node.name}", node.end_lineno - node.lineno + 1, FUNCTION_LINES
                yield f"{name}:{node.name}()", len(parameters(node)), PARAMETERS


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of the parameters without self and cls."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def overruns(root: Path, exceptions: dict[str, int]) -> list[str]:
    """Everything over its limit, and exceptions that are no longer needed."""
    problems, used = [], set()
    for name, size, limit in sizes(root):
        if size > limit and name in exceptions:
            used.add(name)
            limit = exceptions[name]
        if size > limit:
            problems.append(f"{name}: {size} > {limit}")
    return problems + [f"{name}: exception no longer needed" for name in exceptions if name not in used]


def test_every_folder_file_and_function_is_within_its_limit() -> None:
    assert overruns(REPO / "fledge", EXCEPTIONS) == []


def test_no_test_folder_has_too_many_files() -> None:
    folders = [REPO / "tests", *(path for path in (REPO / "tests").rglob("*") if path.is_dir())]
    counts = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > FOLDER_FILES} == {}


def test_the_check_finds_each_kind_of_overrun(tmp_path: Path) -> None:
    many = ", ".join(f"a{number}" for number in range(9))
    body = "    pass\n" * 60
    (tmp_path / "long.py").write_text("x = 1\n" * 401, encoding="utf-8")
    (tmp_path / "wide.py").write_text(
        f"class C:\n    def eight(self, {many[4:]}): ...\ndef nine({many}): ...\ndef tall():\n{body}", encoding="utf-8"
    )
    assert overruns(tmp_path, {"wide.py:gone": 70}) == [
        "long.py: 401 > 400",
        "wide.py:nine(): 9 > 8",
        "wide.py:tall: 61 > 60",
        "wide.py:gone: exception no longer needed",
    ]
    assert overruns(tmp_path, {"long.py": 401, "wide.py:nine()": 9, "wide.py:tall": 61}) == []
