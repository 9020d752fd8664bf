"""The chat page in a browser: what a reader does with it, against a real server with a model that answers as told."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from running import CUE, TOKENIZER, Server, random_model, serving
from torch import Tensor

from fledge.engine.llm.llm import LLM
from fledge.models.state import State

pytest.importorskip("playwright", reason="the tests of the chat page need playwright")
pytest.importorskip("axe_playwright_python", reason="the tests of the chat page need axe-playwright-python")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

pytestmark = pytest.mark.browser

CHROMES = ("chromium", "chromium-browser", "google-chrome")
ENDPOINT = "**/v1/chat/completions"
FIRST, SECOND, THIRD = "Hello, I am one.", "Now I am two.", "And three."
LONG = "word " * 200 + "end"
RICH = (
    "# Title\n**bold** and <img src=x onerror=alert(1)>\n- one\n- two\n\n```py\nx = 1 < 2\n```\n"
    "[good](https://example.org) [bad](javascript:alert(1)) " + "long" * 60
)
PATIENCE = 20_000  # milliseconds, for a machine that is busy
KEY = "alice-0123456789abcdef"


class Slow(FakeModel):
    """Waits after so many tokens of an answer until it may go on."""

    def __init__(self, *replies: str) -> None:
        super().__init__([TOKENIZER.encode(reply) for reply in replies], CUE, TOKENIZER.vocab_size)
        self.wait_after: int | None = None
        self.may_go_on = threading.Event()

    def forward(
        self, idx: Tensor, state: State | None = None, *, lengths: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, State]:
        if self.wait_after is not None and idx.shape == (1, 1):
            self.wait_after -= 1
            if self.wait_after < 0:
                assert self.may_go_on.wait(timeout=20)
        return super().forward(idx, state, lengths=lengths, last=last)

    def hold(self, after: int) -> None:
        """Stop after so many tokens."""
        self.may_go_on.clear()
        self.wait_after = after

    def release(self) -> None:
        """Go on."""
        self.wait_after = None
        self.may_go_on.set()


def told(model: FakeModel) -> LLM:
    return LLM(model, TOKENIZER, "fake")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, or a skip that says what is missing."""
    found = next(filter(None, map(shutil.which, CHROMES)), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a browser: chromium on the PATH, or `python -m playwright install chromium`")
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def model() -> Slow:
    return Slow(FIRST, SECOND, THIRD)


@pytest.fixture(scope="module")
def server(model: Slow, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(told(model), tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page in a browser that knows nothing; no script may fail, nothing break the policy."""
    yield from opened(browser, server)


def opened(browser: Browser, server: Server, **how: Any) -> Iterator[Page]:
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | how))
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    faults = list[str]()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if "Security Policy" in line.text else None)
    page.goto(server.url)
    yield page
    context.close()
    assert faults == []


def write(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def say(page: Page, text: str) -> dict[str, Any]:
    """Write, and wait for the answer; the body of the request."""
    with page.expect_request(ENDPOINT) as request:
        write(page, text)
    done(page)
    return request.value.post_data_json


def turn(page: Page, number: int) -> Locator:
    return page.locator(".turn").nth(number)


def rows(page: Page) -> Locator:
    return page.get_by_role("treeitem")


def labels(page: Page) -> list[str]:
    return page.locator("[role=treeitem] .label").all_inner_texts()


def stored(page: Page) -> list[dict[str, Any]]:
    """The turns as the browser keeps them, oldest first."""
    found = page.evaluate("Object.entries(localStorage).filter(([name]) => name.startsWith('fledge.turn.'))")
    return sorted((json.loads(text) for _, text in found), key=lambda turn: (turn["created"], turn.get("number", 0)))


def test_an_answer_streams_and_the_next_goes_on_from_its_state(page: Page, model: Slow) -> None:
    model.hold(after=9)
    write(page, "Who are you?")
    answer = turn(page, 0).locator(".text")
    expect(answer).to_contain_text(FIRST[:5])
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    assert answer.inner_text() != FIRST
    model.release()
    expect(answer).to_have_text(FIRST)
    done(page)
    expect(turn(page, 0).locator(".figures")).to_contain_text("tokens")
    expect(page.locator("#spoken")).to_have_text(f"Answer: {FIRST}")
    sent = say(page, "And now?")
    assert sent["messages"] == [{"role": "user", "content": "And now?"}]
    assert sent["fledge"]["state"] == stored(page)[0]["state"]
    expect(turn(page, 1).locator(".text")).to_have_text(SECOND)


@pytest.mark.parametrize("by", ["button", "key"])
def test_a_stopped_answer_stays_and_is_read_with_the_next_message(page: Page, model: Slow, by: str) -> None:
    model.hold(after=9)
    write(page, "Who are you?")
    expect(turn(page, 0).locator(".text")).to_contain_text(FIRST[:5])
    if by == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    done(page)
    model.release()
    expect(turn(page, 0).locator(".figures")).to_contain_text("stopped")
    kept = turn(page, 0).locator(".text").inner_text()
    with page.expect_download():  # the server makes a state of it where one is wanted
        page.get_by_role("button", name="Save state").click()
    assert stored(page)[0]["state"].startswith("st_")
    page.evaluate(
        "for (const name in localStorage) if (name.startsWith('fledge.turn.')) { "
        "const turn = JSON.parse(localStorage[name]); turn.state = null; localStorage[name] = JSON.stringify(turn); }"
    )
    page.reload()
    sent = say(page, "And now?")
    assert [message["content"] for message in sent["messages"]] == ["Who are you?", kept, "And now?"]
    assert "state" not in sent["fledge"]
    expect(turn(page, 1).locator(".text")).to_have_text(SECOND)


def test_an_edited_message_begins_a_branch_at_the_state_before_it(page: Page) -> None:
    say(page, "One")
    say(page, "Two")
    turn(page, 1).get_by_role("button", name="Edit").click()
    page.get_by_label("Your message, changed").fill("Zwei")
    with page.expect_request(ENDPOINT) as request:
        page.get_by_role("button", name="Send as a branch").click()
    done(page)
    assert request.value.post_data_json["fledge"]["state"] == stored(page)[0]["state"]
    assert labels(page) == ["Beginning", "One", "Two", "Zwei"]
    expect(turn(page, 1).locator(".question")).to_have_text("Zwei")
    expect(turn(page, 1).locator(".text")).to_have_text(SECOND)
    turn(page, 1).get_by_role("button", name="Branch before").click()
    expect(turn(page, 1).locator(".question")).to_have_text("Two")


def test_the_tree_goes_back_without_a_request_and_on_from_there(page: Page) -> None:
    for text in ("One", "Two", "Three"):
        say(page, text)
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url))
    rows(page).filter(has_text="One").click()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator("#onward")).to_contain_text("2 turns follow")
    assert asked == []
    assert say(page, "Zwei")["fledge"]["state"] == stored(page)[0]["state"]
    expect(turn(page, 1).locator(".text")).to_have_text(SECOND)
    assert labels(page) == ["Beginning", "One", "Two", "Three", "Zwei"]


def test_the_tree_is_walked_with_the_keyboard(page: Page) -> None:
    say(page, "One")
    say(page, "Two")
    rows(page).filter(has_text="One").click()
    say(page, "Zwei")
    rows(page).filter(has_text="Zwei").focus()
    seen = []
    for key in (
        "Home",
        "ArrowDown",
        "ArrowLeft",
        "ArrowDown",
        "ArrowUp",
        "ArrowRight",
        "ArrowRight",
        "ArrowLeft",
        "End",
    ):
        page.keyboard.press(key)
        label = page.evaluate("document.activeElement.querySelector('.label').textContent")
        seen.append((label, rows(page).count()))
    assert seen == [
        ("Beginning", 4), ("One", 4), ("One", 2), ("One", 2), ("Beginning", 2),
        ("One", 2), ("One", 4), ("One", 2), ("One", 2),
    ]  # fmt: skip
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(turn(page, 1).locator(".question")).to_have_text("Two")
    expect(rows(page).filter(has_text="Two")).to_have_attribute("aria-selected", "true")
    expect(rows(page).filter(has_text="Two")).to_be_focused()


def test_retry_gives_another_answer_beside_the_first(page: Page) -> None:
    page.evaluate("localStorage.setItem('fledge.settings', JSON.stringify({seed: '7', top_k: '3', stop: 'x\\ny'}))")
    page.reload()
    first = say(page, "One")
    with page.expect_request(ENDPOINT) as request:
        turn(page, 0).get_by_role("button", name="Retry").click()
    done(page)
    second = request.value.post_data_json
    assert (first["seed"], second["seed"]) == (7, 8)
    assert first["messages"] == second["messages"]
    assert (first["fledge"]["top_k"], first["stop"]) == (3, ["x", "y"])
    expect(turn(page, 0).locator(".siblings")).to_contain_text("2/2")
    assert len(stored(page)) == 2


def test_several_answers_stand_side_by_side_until_one_is_chosen(page: Page) -> None:
    say(page, "One")
    page.get_by_label("Answers at once").select_option("3")
    assert say(page, "Two")["n"] == 3
    expect(page.locator(".choice .text")).to_have_text([SECOND] * 3)
    write(page, "Kept until then")
    expect(page.locator("#notice")).to_contain_text("Choose")
    page.reload()
    expect(page.locator(".choice .text")).to_have_text([SECOND] * 3)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Kept until then")
    page.get_by_role("button", name="Go on with this").nth(1).click()
    page.get_by_label("Answers at once").select_option("1")
    states = [each["state"] for each in stored(page)]
    assert len(set(states)) == len(states) == 4
    assert say(page, "Three")["fledge"]["state"] == states[2]
    expect(turn(page, 2).locator(".text")).to_have_text(THIRD)


def test_states_and_trees_are_saved_and_opened(page: Page, browser: Browser, server: Server, tmp_path: Path) -> None:
    say(page, "One")
    with page.expect_download() as state:
        page.get_by_role("button", name="Save state").click()
    with page.expect_download() as tree:
        page.get_by_role("button", name="Save as JSON").click()
    state.value.save_as(tmp_path / "one.state")
    tree.value.save_as(tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["turns"] == stored(page)
    for other in opened(browser, server):
        other.locator("#file").set_input_files(tmp_path / "one.state")
        expect(turn(other, 0)).to_contain_text("Goes on from the state one")
        say(other, "Two")
        expect(turn(other, 1).locator(".text")).to_have_text(SECOND)
        other.locator("#file").set_input_files(tmp_path / "one.json")
        expect(turn(other, 0).locator(".text")).to_have_text(FIRST)
        assert labels(other) == ["Beginning", "One", "State: one", "Two"]
        other.locator("#file").set_input_files({"name": "x.json", "mimeType": "text/json", "buffer": b'{"a": 1}'})
        expect(other.locator("#notice")).to_contain_text("no conversation")
        other.locator("#file").set_input_files({"name": "x.state", "mimeType": "", "buffer": b"nothing of that kind"})
        expect(other.locator("#notice")).not_to_contain_text("no conversation")
        expect(other.locator("#notice")).not_to_be_empty()


def test_a_state_goes_on_in_the_template_it_was_read_in(page: Page, server: Server, tmp_path: Path) -> None:
    read = server.post("/v1/fledge/states", {"messages": [{"role": "user", "content": "One"}], "template": "instruct"})
    file = server.http.get(f"/v1/fledge/states/{read.json()['id']}/file").content
    page.locator("#file").set_input_files({"name": "one.state", "mimeType": "", "buffer": file})
    expect(turn(page, 0)).to_contain_text("Goes on from the state one")
    assert say(page, "Two")["fledge"]["template"] == "instruct"
    page.reload()
    assert say(page, "Three")["fledge"]["template"] == "instruct"


def test_a_reload_comes_back_to_the_same_place_with_what_was_being_written(page: Page) -> None:
    say(page, "One")
    say(page, "Two")
    rows(page).filter(has_text="One").click()
    page.get_by_label("Message", exact=True).fill("Half a thou")
    turn(page, 0).get_by_role("button", name="Edit").click()
    page.get_by_label("Your message, changed").fill("Eins, or")
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)
    assert labels(page) == ["Beginning", "One", "Two"]
    expect(page.get_by_label("Message", exact=True)).to_have_value("Half a thou")
    expect(page.get_by_label("Your message, changed")).to_have_value("Eins, or")
    page.keyboard.press("Escape")


def test_two_tabs_write_to_one_tree(page: Page, server: Server) -> None:
    other = page.context.new_page()
    other.goto(server.url)
    say(page, "One")
    say(other, "Uno")
    for tab in (page, other):
        expect(rows(tab)).to_have_count(3)
    page.reload()
    expect(turn(page, 0).locator(".question")).to_have_text("One")
    assert labels(page) == ["Beginning", "One", "Uno"]


def test_a_full_storage_is_told_and_the_page_works_on(page: Page) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    say(page, "One")
    say(page, "Two")
    expect(turn(page, 1).locator(".text")).to_have_text(SECOND)
    expect(page.locator("#notice")).to_contain_text("save the conversation")
    with page.expect_download() as tree:
        page.get_by_role("button", name="Save as JSON").click()
    saved = json.loads(Path(tree.value.path()).read_text(encoding="utf-8"))
    assert [each["user"] for each in saved["turns"]] == ["One", "Two"]


def test_a_branch_is_removed_after_a_question(page: Page, server: Server) -> None:
    say(page, "One")
    say(page, "Two")
    state = stored(page)[1]["state"]
    page.get_by_role("button", name="Remove branch").click()
    page.get_by_role("button", name="Keep it").click()
    assert labels(page) == ["Beginning", "One", "Two"]
    page.get_by_role("button", name="Remove branch").click()
    with page.expect_response("**/v1/fledge/states/*") as response:
        page.get_by_role("button", name="Remove", exact=True).click()
    assert response.value.ok and server.http.get(f"/v1/fledge/states/{state}").status_code == 404
    assert labels(page) == ["Beginning", "One"] and len(stored(page)) == 1


def test_a_server_with_keys_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nname = "alice"\nkey = "{KEY}"\n', encoding="utf-8")
    with serving(told(Slow(FIRST)), tmp_path / "states", keys=tmp_path / "keys.toml") as server:
        for page in opened(browser, server):
            expect(page.get_by_label("API key")).to_be_focused()
            write(page, "Let me in")
            expect(turn(page, 0).get_by_role("alert")).to_contain_text("key")
            expect(turn(page, 0).locator(".question")).to_have_text("Let me in")
            page.get_by_label("API key").fill("wrong")
            page.get_by_role("button", name="Use this key").click()
            expect(page.locator("#notice")).not_to_be_empty()
            page.get_by_label("API key").fill(KEY)
            page.get_by_role("button", name="Use this key").click()
            expect(turn(page, 0).locator(".text")).to_have_text(FIRST)
            expect(page.locator("#key-form")).to_be_hidden()
            page.reload()
            expect(page.locator("#model")).to_have_text("fake")
            assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_an_error_is_told_in_place_and_loses_nothing(page: Page) -> None:
    error = {"error": {"message": "the disk is full", "type": "server_error", "param": None, "code": None}}
    page.route(ENDPOINT, lambda route: route.fulfill(status=507, json=error))
    write(page, "Precious words")
    expect(turn(page, 0).get_by_role("alert")).to_contain_text("the disk is full")
    expect(turn(page, 0).locator(".question")).to_have_text("Precious words")
    page.unroute(ENDPOINT)
    page.route(ENDPOINT, lambda route: route.abort())
    turn(page, 0).get_by_role("button", name="Retry").click()
    expect(turn(page, 0).get_by_role("alert")).to_contain_text("cannot be reached")
    page.reload()
    expect(turn(page, 0).locator(".question")).to_have_text("Precious words")
    streams(page, piece("Half"), {"error": {"message": "it burst"}}, ends=False)
    turn(page, 0).get_by_role("button", name="Retry").click()
    expect(turn(page, 0).get_by_role("alert")).to_contain_text("it burst")
    expect(turn(page, 0).locator(".text")).to_have_text("Half")
    page.unroute(ENDPOINT)
    turn(page, 0).get_by_role("alert").get_by_role("button", name="Retry").click()
    expect(turn(page, 0).locator(".text")).to_have_text(FIRST)
    assert len(stored(page)) == 1


def test_a_state_that_the_server_has_forgotten_is_read_again(page: Page, server: Server) -> None:
    say(page, "One")
    say(page, "Two")
    for each in stored(page):
        assert server.http.delete(f"/v1/fledge/states/{each['state']}").status_code == 200
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    write(page, "Three")
    expect(turn(page, 2).locator(".text")).to_have_text(THIRD)
    done(page)
    expect(page.locator("#notice")).to_contain_text("reads the messages again")
    assert [len(body["messages"]) for body in sent] == [1, 5]
    assert "state" not in sent[1]["fledge"] and stored(page)[2]["state"].startswith("st_")


def test_a_server_without_states_gets_all_messages(browser: Browser) -> None:
    with serving(told(Slow(FIRST, SECOND))) as server:
        for page in opened(browser, server):
            expect(page.locator("#tree-note")).to_contain_text("read again")
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("System text").fill("Be short.")
            say(page, "One")
            sent = say(page, "Two")
            assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
            assert sent["fledge"] == {"template": "world"}
            expect(turn(page, 1).locator(".text")).to_have_text(SECOND)


def test_a_conversation_keeps_the_template_and_the_system_text_it_began_with(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System text").fill("Be short.")
    assert say(page, "One")["fledge"]["template"] == "world"
    page.get_by_label("Template").select_option("qa")
    page.get_by_label("System text").fill("Be long.")
    assert say(page, "Two")["fledge"]["template"] == "world"
    page.get_by_role("treeitem").nth(1).click()
    with page.expect_request(ENDPOINT) as request:
        turn(page, 0).get_by_role("button", name="Retry").click()
    done(page)
    sent = request.value.post_data_json
    assert sent["messages"][0] == {"role": "system", "content": "Be short."} and sent["fledge"]["template"] == "world"


def streams(page: Page, *events: dict[str, Any], ends: bool = True) -> None:
    """Let the next requests be answered with a stream of these events."""
    lines = [*map(json.dumps, events), *(["[DONE]"] if ends else [])]
    body = "".join(f"data: {line}\n\n" for line in lines)
    page.unroute(ENDPOINT)
    page.route(ENDPOINT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def test_answers_are_shown_as_text_never_as_markup(browser: Browser, server: Server) -> None:
    for page in opened(browser, server, viewport={"width": 360, "height": 700}):
        streams(page, piece(RICH[:30]), piece(RICH[30:]))
        write(page, "<b>Show</b> it " + "wide" * 60)
        text = turn(page, 0).locator(".text")
        expect(text.locator("h3")).to_have_text("Title")
        expect(text.locator("strong")).to_have_text("bold")
        expect(text.locator("li")).to_have_text(["one", "two"])
        expect(text.locator("pre")).to_have_text("x = 1 < 2")
        expect(text.locator("img")).to_have_count(0)
        assert [link.get_attribute("href") for link in text.locator("a").all()] == ["https://example.org"]
        expect(turn(page, 0).locator(".question")).to_contain_text("<b>Show</b>")
        narrow(page)


def narrow(page: Page) -> None:
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")


def test_a_small_screen_has_drawers_and_never_scrolls_sideways(browser: Browser, server: Server) -> None:
    for page in opened(browser, server, viewport={"width": 360, "height": 640}):
        narrow(page)
        page.get_by_label("Answers at once").select_option("4")
        say(page, "Averylongword" * 20)
        narrow(page)
        page.get_by_role("button", name="Go on with this").first.click()
        for name, title in (("Tree", "Tree"), ("State", "State"), ("Settings", "Settings")):
            page.get_by_role("button", name=name, exact=True).click()
            expect(page.locator(f"#{title.lower()}")).to_be_visible()
            expect(page.locator("aside:visible")).to_have_count(1)
            narrow(page)
            page.keyboard.press("Escape")
            expect(page.locator("aside:visible")).to_have_count(0)
        page.keyboard.press("Escape")


def test_the_reader_who_scrolls_up_is_left_there(browser: Browser) -> None:
    model = Slow(LONG)
    with serving(told(model)) as server:
        for page in opened(browser, server, viewport={"width": 400, "height": 500}):
            log = page.locator("#log")
            model.hold(after=700)
            write(page, "Tell")
            expect(turn(page, 0).locator(".text")).to_contain_text("word " * 100)
            end = "element => element.scrollHeight - element.scrollTop - element.clientHeight"
            assert log.evaluate(end) < 60
            log.evaluate("element => { element.scrollTop = 40; }")
            expect(page.get_by_role("button", name="Newest")).to_be_visible()
            model.release()
            done(page)
            assert log.evaluate("element => element.scrollTop") == 40
            page.get_by_role("button", name="Newest").click()
            assert log.evaluate(end) < 2


def test_the_theme_is_the_system_s_until_it_is_chosen(browser: Browser, server: Server) -> None:
    for page in opened(browser, server, color_scheme="dark"):
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(paper)
        page.get_by_role("button", name="Dark colours", pressed=True).click()
        light = page.evaluate(paper)
        assert light != dark
        page.reload()
        expect(page.get_by_role("button", name="Dark colours", pressed=False)).to_be_visible()
        assert page.evaluate(paper) == light


def test_keys(page: Page) -> None:
    area = page.get_by_label("Message", exact=True)
    area.fill("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line?")
    expect(area).to_have_value("One\nline?")
    page.locator("#log").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Help")).to_be_hidden()
    page.locator("#log").focus()
    page.keyboard.press("/")
    expect(area).to_be_focused()
    area.evaluate("area => area.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))")
    expect(area).to_have_value("One\nline?")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with heads to look at."""
    with serving(random_model(), tmp_path_factory.mktemp("real")) as running:
        yield running


def test_the_state_has_a_picture_and_a_table(browser: Browser, real: Server) -> None:
    for page in opened(browser, real):
        page.get_by_role("button", name="State", exact=True).click()
        expect(page.locator("#picture")).to_contain_text("Nothing has been read")
        page.evaluate("localStorage.setItem('fledge.settings', JSON.stringify({max_tokens: '5'}))")
        page.reload()
        say(page, "One")
        page.get_by_role("button", name="Look again").click()
        expect(page.get_by_role("img", name="Heat map of half-lives: 2 layers with 4 heads")).to_be_visible()
        page.get_by_text("As a table").first.click()
        expect(page.get_by_role("table", name="Half-lives").get_by_role("cell")).to_have_count(9)
        page.reload()
        expect(page.get_by_role("img", name="Heat map of half-lives")).to_be_visible()
        expect(page.locator(".pieces li").first).to_contain_text("User: One")
        expect(page.get_by_role("meter").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_inaccessible(browser: Browser, real: Server, scheme: str) -> None:
    for page in opened(browser, real, color_scheme=scheme, reduced_motion="reduce"):
        page.evaluate("localStorage.setItem('fledge.settings', JSON.stringify({max_tokens: '5'}))")
        page.reload()
        accessible(page)
        say(page, "One")
        say(page, "Two")
        turn(page, 0).get_by_role("button", name="Edit").click()
        page.get_by_role("button", name="State", exact=True).click()
        expect(page.locator(".map").first).to_be_visible()
        page.get_by_text("As a table").first.click()
        accessible(page)
        page.get_by_label("Answers at once").select_option("2")
        say(page, "Several")
        page.get_by_role("button", name="Settings").click()
        page.route(ENDPOINT, lambda route: route.abort())
        accessible(page)
        page.get_by_role("button", name="Go on with this").first.click()
        page.get_by_label("Answers at once").select_option("1")
        write(page, "Fails")
        expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
        page.locator("#key-form").evaluate("form => { form.hidden = false; }")
        accessible(page)
        page.get_by_role("button", name="Help and keys").click()
        accessible(page)
        switch = page.get_by_role("button", name="Dark colours", include_hidden=True)
        assert switch.get_attribute("aria-pressed") == str(scheme == "dark").lower()


def accessible(page: Page) -> None:
    """No violation of any rule; in the dark only colours are another matter than in the light."""
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    results = Axe().run(page, options={"runOnly": ["color-contrast"]} if dark else None)
    assert results.violations_count == 0, results.generate_report()
