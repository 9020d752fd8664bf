"""The repository as a whole: no file names a machine or a package host, and documents refer only to existing files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home)/")
PACKAGE_HOST = re.compile(
    r"index[-_]url|pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|://[^\s/]+/simple\b", re.I
)


def repository_files() -> list[Path]:
    """Every file that is tracked or could be committed. Skips the test if git is not available."""
    git = shutil.which("git")
    if git is None or not (REPO / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(set(filter(None, listing.split("\0")))) if (path := REPO / name).is_file()]


def text_of(path: Path) -> str | None:
    """The text of a file, or None if it is binary."""
    data = path.read_bytes()
    return None if b"\0" in data[:8192] else data.decode("utf-8", errors="replace")


def leaks(text: str) -> list[str]:
    """The lines of `text` that contain a path on one machine or a package host."""
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line) or PACKAGE_HOST.search(line)]


def test_no_file_names_a_machine_path_or_a_package_host() -> None:
    found = {
        path.relative_to(REPO).as_posix(): lines
        for path in repository_files()
        if (text := text_of(path)) is not None and (lines := leaks(text))
    }
    assert found == {}


@pytest.mark.parametrize("folder", ["work", "root", "home"])
def test_leak_check_catches_paths(folder: str) -> None:
    assert leaks(f'open("/{folder}/me/model.pth")') and leaks(f"/{folder}/me")
    assert not leaks(f"docs/{folder}/page and ../{folder}/page and a /{folder} without more")


@pytest.mark.parametrize("parts", ["pip install --extra-index|-url x", "https://py|pi.org/p", "http://host/sim|ple x"])
def test_leak_check_catches_hosts(parts: str) -> None:
    assert leaks(parts.replace("|", ""))


def fenced_blocks(markdown: str) -> list[list[str]]:
    """The lines of each fenced block."""
    return [block.splitlines() for block in re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.M | re.S)]


def tree_paths(lines: list[str]) -> list[str]:
    """The paths in a drawn file tree; empty if the block is something else (its first line is not a folder)."""
    entries = [line.split("#")[0].rstrip() for line in lines if line.strip()]
    if not entries or not re.match(r"[\w.-]+/(\s|$)", entries[0]):
        return []
    paths, stack = [], []
    for entry in entries:
        match = re.match(r"([\s│├└─|`+-]*)([\w.-]+(?:/[\w.-]+)*/?)", entry)
        if match is None:
            continue
        while stack and stack[-1][0] >= len(match[1]):
            stack.pop()
        path = (stack[-1][1] if stack else "") + match[2]
        paths.append(path)
        if path.endswith("/"):
            stack.append((len(match[1]), path))
    return paths


def test_readme_tree_exists_on_disk() -> None:
    readme = REPO / "README.md"
    if not readme.exists():
        pytest.skip("no README.md")
    blocks = fenced_blocks(readme.read_text(encoding="utf-8"))
    named = [path for block in blocks for path in tree_paths(block)]
    assert [path for path in named if not (REPO / path).exists()] == []


def test_tree_reader() -> None:
    drawn = [
        "fledge/     the package",
        "├── core/   errors",
        "│   └── files.py",
        "└── cli/",
        "tests/",
        "  conftest.py  seeds",
    ]
    expected = ["fledge/", "fledge/core/", "fledge/core/files.py", "fledge/cli/", "tests/", "tests/conftest.py"]
    assert tree_paths(drawn) == expected
    assert tree_paths(["make demo", "fledge/core"]) == []


def test_links_between_documents_resolve() -> None:
    broken = [
        f"{path.relative_to(REPO)}: {target}"
        for path in repository_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert broken == []
