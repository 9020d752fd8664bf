"""The chat page as files: it asks no other host for anything, obeys the server's policy, and ships in the package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from running import Server, fake, serving
from test_repository import REPO, repository_files

PAGE = REPO / "fledge" / "server" / "page"
FILES = sorted(PAGE.iterdir())
LINES = 300
NAMESPACES = ("http://www.w3.org/2000/svg",)
IMPORT = re.compile(r'from "\./([\w.]+)"')


class Reading(HTMLParser):
    """The names of tags and attributes of a page, its ids, and what stands inside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes = list[tuple[str, str, str]]()
        self.inside = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inside += data.strip()


def page() -> Reading:
    return Reading((PAGE / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_points_to_another_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for namespace in NAMESPACES:
        text = text.replace(namespace, "")
    assert not re.search(r"https?://|[\"'(]//\w", text)


def test_scripts_styles_and_handlers_are_in_files_of_their_own() -> None:
    found = page()
    assert found.inside == ""
    assert not [name for _, name, _ in found.attributes if name == "style" or name.startswith("on")]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_everything_that_is_named_is_there() -> None:
    attributes = page().attributes
    names = {path.name for path in FILES}
    asked = {value for tag, name, value in attributes if name in ("href", "src") and not value.startswith("#")}
    assert asked <= names
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pointers = ("for", "aria-controls", "aria-labelledby")
    assert {value for _, name, value in attributes if name in pointers} <= set(ids)
    assert {value[1:] for _, name, value in attributes if name == "href" and value.startswith("#")} <= set(ids)
    for path in FILES:
        if path.suffix == ".js":
            text = path.read_text(encoding="utf-8")
            assert set(IMPORT.findall(text)) <= names
            assert set(re.findall(r'\bby\("([\w-]+)"\)', text)) <= set(ids), path.name


def test_no_file_is_without_use() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    assert [path.name for path in FILES if path.name != "index.html" and path.name not in text] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_scripts_are_short_enough_to_be_read(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= 200


def test_the_files_are_in_the_package() -> None:
    # The wheel takes all of fledge/ and the source distribution what is not excluded; both only what git knows.
    assert {path for path in repository_files() if path.parent == PAGE} == set(FILES)
    build = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert 'wheel.packages = ["fledge"]' in build
    (included,) = re.findall(r"^sdist.include = (\[.*\])", build, re.M)
    (excluded,) = re.findall(r"^sdist.exclude = (\[.*\])", build, re.M)
    assert '"fledge"' in included and "page" not in excluded


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(fake("Yes")) as running:
        yield running


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_server_hands_each_out_as_what_it_is(server: Server, path: Path) -> None:
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    answer = server.http.get(f"/{'' if path.name == 'index.html' else path.name}")
    assert answer.status_code == 200 and answer.content == path.read_bytes()
    assert (
        answer.headers["content-type"].split(";")[0].replace("application/javascript", "text/javascript")
        == (kinds[path.suffix])
    )
    assert "default-src 'self'" in answer.headers["content-security-policy"]
