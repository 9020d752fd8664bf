"""Ceilings on size, so that every file and function can be read in one go. Raising one is a visible line here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 8

# Larger ceilings, each with its reason: "room/file.py" -> lines of the file; "room/file.py:function" -> lines of the
# function; "room/file.py:function()" -> its parameters. An entry that is no longer needed fails the test.
EXCEPTIONS: dict[str, int] = {}


def sizes(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name as in EXCEPTIONS, size, ceiling) of every file and function below `root`."""
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
    """Names of the parameters a caller can give, without self and cls."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def overruns(root: Path, exceptions: dict[str, int]) -> list[str]:
    """What is over its ceiling, and which exceptions have become useless."""
    found, used = [], set()
    for name, size, ceiling in sizes(root):
        if size > ceiling and name in exceptions:
            used.add(name)
            ceiling = exceptions[name]
        if size > ceiling:
            found.append(f"{name}: {size} > {ceiling}")
    return found + [f"{name}: exception no longer needed" for name in exceptions if name not in used]


def test_every_file_and_function_is_within_budget() -> None:
    assert overruns(REPO / "fledge", EXCEPTIONS) == []


def test_checker_catches(tmp_path: Path) -> None:
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
