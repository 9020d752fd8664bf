"""Hooks of `mkdocs build`: add README, CHANGELOG, CONTRIBUTING, the benchmarks and an API reference to the site.

The pages of docs/ have links that work in a checkout. A link to a file that is not a page of the site is shown as text.
The API reference has one page for each module of the package, generated from its docstrings.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
# Pages from outside docs/: page of the site -> file of the repository.
COPIED = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the copied pages and the API reference."""
    for page, source in COPIED.items():
        files.append(File.generated(config, page, content=(REPO / source).read_text(encoding="utf-8")))
    for picture in (REPO / "benchmarks").glob("*.png"):
        files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    modules = list_modules()
    files.append(File.generated(config, "reference/index.md", content=index_page(modules)))
    for module in modules:
        files.append(File.generated(config, f"reference/{module}.md", content=f"# {module}\n\n::: {module}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site, and show links to other files of the repository as text."""
    page_path = page.file.src_uri
    source = COPIED.get(page_path, f"docs/{page_path}")

    def rewrite(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in target or page_path.startswith("reference/"):
            return match.group()
        repository_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        site_path = path_on_site(repository_path)
        if site_path is None or files.get_file_from_path(site_path) is None:
            if not (REPO / repository_path).exists():
                return match.group()  # a broken link: mkdocs reports it
            return f"{text} (`{repository_path}`)" if text.strip("`") != repository_path else f"`{repository_path}`"
        relative = posixpath.relpath(site_path, posixpath.dirname(page_path) or ".")
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, markdown)


def path_on_site(repository_path: str) -> str | None:
    """The page or picture of the site that shows a file of the repository."""
    for page, source in COPIED.items():
        if source == repository_path:
            return page
    if repository_path.startswith("docs/"):
        return repository_path.removeprefix("docs/")
    return repository_path if repository_path.startswith("benchmarks/") else None


def list_modules() -> list[str]:
    """Every module of the package, by dotted name, packages before their modules."""
    modules = []
    for path in sorted((REPO / "fledge").rglob("*.py"), key=lambda path: path.with_suffix("").parts):
        parts = path.relative_to(REPO).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(modules)


def index_page(modules: list[str]) -> str:
    """The list of all modules with the first line of each docstring."""
    lines = [
        "# API reference",
        "",
        "Every module, with the first line of its docstring.",
        "",
        "| module | purpose |",
        "|---|---|",
    ]
    for module in modules:
        path = REPO / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        purpose = (
            (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].replace("\n", " ")
        )
        lines.append(f"| [`{module}`]({module}.md) | {purpose.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
