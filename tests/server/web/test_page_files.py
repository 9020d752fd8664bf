"""The files of the chat page: they use no other host, comply with the content policy and are in the package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from live_server import Server, scripted_llm, serving
from test_repository import REPO, repository_files

PAGE = REPO / "fledge" / "server" / "web"
FILES = sorted(PAGE.iterdir())
MAX_LINES = 300
MAX_LINE_LENGTH = 120
NAMESPACES = ("http://www.w3.org/2000/svg",)
IMPORT = re.compile(r'from "\./([\w.]+)"')


class ParsedPage(HTMLParser):
    """The attributes of a page, and the content of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes = list[tuple[str, str, str]]()
        self.inline_code = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inline_code += data.strip()


def parse_page() -> ParsedPage:
    return ParsedPage((PAGE / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_link_to_no_other_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for namespace in NAMESPACES:
        text = text.replace(namespace, "")
    assert not re.search(r"https?://|[\"'(]//\w", text)


def test_page_has_no_inline_code_and_creates_no_html() -> None:
    parsed = parse_page()
    assert parsed.inline_code == ""
    assert not [name for _, name, _ in parsed.attributes if name == "style" or name.startswith("on")]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_referenced_files_and_ids_exist() -> None:
    attributes = parse_page().attributes
    names = {path.name for path in FILES}
    linked = {value for tag, name, value in attributes if name in ("href", "src") and not value.startswith("#")}
    assert linked <= names
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = ("for", "aria-controls", "aria-labelledby")
    assert {value for _, name, value in attributes if name in references} <= set(ids)
    assert {value[1:] for _, name, value in attributes if name == "href" and value.startswith("#")} <= set(ids)
    for path in FILES:
        if path.suffix == ".js":
            text = path.read_text(encoding="utf-8")
            assert set(IMPORT.findall(text)) <= names
            assert set(re.findall(r'\bbyId\("([\w-]+)"\)', text)) <= set(ids), path.name


def test_no_file_is_unused() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    assert [path.name for path in FILES if path.name != "index.html" and path.name not in text] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_scripts_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= MAX_LINE_LENGTH


def test_files_are_packaged() -> None:
    # The wheel contains everything in fledge/. The source distribution contains everything that is not excluded. Both
    # contain only files that git tracks.
    assert {path for path in repository_files() if path.parent == PAGE} == set(FILES)
    build = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert 'wheel.packages = ["fledge"]' in build
    (included,) = re.findall(r"^sdist.include = (\[.*\])", build, re.M)
    (excluded,) = re.findall(r"^sdist.exclude = (\[.*\])", build, re.M)
    assert '"fledge"' in included and "web" not in excluded


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(scripted_llm("Yes")) as running:
        yield running


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_server_sends_files_with_their_content_type(server: Server, path: Path) -> None:
    content_types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    response = server.http.get(f"/{'' if path.name == 'index.html' else path.name}")
    assert response.status_code == 200 and response.content == path.read_bytes()
    content_type = response.headers["content-type"].split(";")[0]
    assert content_type.replace("application/javascript", "text/javascript") == content_types[path.suffix]
    assert "default-src 'self'" in response.headers["content-security-policy"]
