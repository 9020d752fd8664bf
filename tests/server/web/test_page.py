"""Browser tests of the chat page, with a real server and a model with fixed replies."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from live_server import CUE, TOKENIZER, Server, random_llm, serving
from torch import Tensor

from fledge.engine.llm.llm import LLM
from fledge.models.state import State

pytest.importorskip("playwright", reason="the chat page tests require playwright")
pytest.importorskip("axe_playwright_python", reason="the chat page tests require axe-playwright-python")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

pytestmark = pytest.mark.browser

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
ENDPOINT = "**/v1/chat/completions"
FIRST, SECOND, THIRD = "Hello, I am one.", "Now I am two.", "And three."
LONG = "word " * 200 + "end"
MARKDOWN = (
    "# Title\n**bold** and <img src=x onerror=alert(1)>\n- one\n- two\n\n```py\nx = 1 < 2\n```\n"
    "[good](https://example.org) [bad](javascript:alert(1)) " + "long" * 60
)
TIMEOUT = 20_000  # milliseconds; long enough for a busy machine
KEY = "alice-0123456789abcdef"


class PausableModel(FakeModel):
    """A model that can pause in the middle of an answer."""

    def __init__(self, *replies: str) -> None:
        super().__init__([TOKENIZER.encode(reply) for reply in replies], CUE, TOKENIZER.vocab_size)
        self.tokens_until_pause: int | None = None
        self.resumed = threading.Event()

    def forward(
        self, idx: Tensor, state: State | None = None, *, lengths: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, State]:
        if self.tokens_until_pause is not None and idx.shape == (1, 1):
            self.tokens_until_pause -= 1
            if self.tokens_until_pause < 0:
                assert self.resumed.wait(timeout=20)
        return super().forward(idx, state, lengths=lengths, last=last)

    def pause(self, after: int) -> None:
        """Pause the next answer after this number of tokens."""
        self.resumed.clear()
        self.tokens_until_pause = after

    def resume(self) -> None:
        """Continue a paused answer."""
        self.tokens_until_pause = None
        self.resumed.set()


def create_llm(model: FakeModel) -> LLM:
    return LLM(model, TOKENIZER, "fake")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. The tests are skipped if it is missing."""
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    with sync_playwright() as playwright:
        if executable is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("requires a browser: chromium on the PATH, or `python -m playwright install chromium`")
        chromium = playwright.chromium.launch(executable_path=executable)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def model() -> PausableModel:
    return PausableModel(FIRST, SECOND, THIRD)


@pytest.fixture(scope="module")
def server(model: PausableModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(create_llm(model), tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The chat page in a new browser context."""
    yield from open_page(browser, server)


def open_page(browser: Browser, server: Server, **options: Any) -> Iterator[Page]:
    """Open the page in a new browser context, and check for script errors and violations of the content policy."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
    context.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    page = context.new_page()
    errors = list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Security Policy" in line.text else None)
    page.goto(server.url)
    yield page
    context.close()
    assert errors == []


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_until_done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def ask(page: Page, text: str) -> dict[str, Any]:
    """Send a message and wait for the answer. Returns the body of the request."""
    with page.expect_request(ENDPOINT) as request:
        send(page, text)
    wait_until_done(page)
    return request.value.post_data_json


def get_turn(page: Page, index: int) -> Locator:
    return page.locator(".turn").nth(index)


def get_tree_items(page: Page) -> Locator:
    return page.get_by_role("treeitem")


def read_labels(page: Page) -> list[str]:
    return page.locator("[role=treeitem] .label").all_inner_texts()


def read_stored_turns(page: Page) -> list[dict[str, Any]]:
    """The turns in the browser's storage, oldest first."""
    items = page.evaluate("Object.entries(localStorage).filter(([name]) => name.startsWith('fledge.turn.'))")
    return sorted((json.loads(text) for _, text in items), key=lambda turn: (turn["created"], turn.get("number", 0)))


def test_answer_streams_and_next_question_continues_from_its_state(page: Page, model: PausableModel) -> None:
    model.pause(after=9)
    send(page, "Who are you?")
    answer = get_turn(page, 0).locator(".text")
    expect(answer).to_contain_text(FIRST[:5])
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    assert answer.inner_text() != FIRST
    model.resume()
    expect(answer).to_have_text(FIRST)
    wait_until_done(page)
    expect(get_turn(page, 0).locator(".metrics")).to_contain_text("tokens")
    expect(page.locator("#announcement")).to_have_text(f"Answer: {FIRST}")
    sent = ask(page, "And now?")
    assert sent["messages"] == [{"role": "user", "content": "And now?"}]
    assert sent["fledge"]["state"] == read_stored_turns(page)[0]["state"]
    expect(get_turn(page, 1).locator(".text")).to_have_text(SECOND)


@pytest.mark.parametrize("control", ["button", "key"])
def test_stopped_answer_is_kept_and_sent_with_next_message(page: Page, model: PausableModel, control: str) -> None:
    model.pause(after=9)
    send(page, "Who are you?")
    expect(get_turn(page, 0).locator(".text")).to_contain_text(FIRST[:5])
    if control == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    wait_until_done(page)
    model.resume()
    expect(get_turn(page, 0).locator(".metrics")).to_contain_text("stopped")
    partial = get_turn(page, 0).locator(".text").inner_text()
    with page.expect_download():  # the server computes the state of the stopped answer
        page.get_by_role("button", name="Save state").click()
    assert read_stored_turns(page)[0]["state"].startswith("st_")
    page.evaluate(
        "for (const name in localStorage) if (name.startsWith('fledge.turn.')) { "
        "const turn = JSON.parse(localStorage[name]); turn.state = null; localStorage[name] = JSON.stringify(turn); }"
    )
    page.reload()
    sent = ask(page, "And now?")
    assert [message["content"] for message in sent["messages"]] == ["Who are you?", partial, "And now?"]
    assert "state" not in sent["fledge"]
    expect(get_turn(page, 1).locator(".text")).to_have_text(SECOND)


def test_edited_message_creates_branch_from_previous_state(page: Page) -> None:
    ask(page, "One")
    ask(page, "Two")
    get_turn(page, 1).get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("Zwei")
    with page.expect_request(ENDPOINT) as request:
        page.get_by_role("button", name="Send as new branch").click()
    wait_until_done(page)
    assert request.value.post_data_json["fledge"]["state"] == read_stored_turns(page)[0]["state"]
    assert read_labels(page) == ["Start", "One", "Two", "Zwei"]
    expect(get_turn(page, 1).locator(".question")).to_have_text("Zwei")
    expect(get_turn(page, 1).locator(".text")).to_have_text(SECOND)
    get_turn(page, 1).get_by_role("button", name="Previous branch").click()
    expect(get_turn(page, 1).locator(".question")).to_have_text("Two")


def test_selecting_earlier_turn_sends_no_request_and_can_be_continued(page: Page) -> None:
    for text in ("One", "Two", "Three"):
        ask(page, text)
    requests = list[str]()
    page.on("request", lambda request: requests.append(request.url))
    get_tree_items(page).filter(has_text="One").click()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator("#branch-note")).to_contain_text("2 turns follow")
    assert requests == []
    assert ask(page, "Zwei")["fledge"]["state"] == read_stored_turns(page)[0]["state"]
    expect(get_turn(page, 1).locator(".text")).to_have_text(SECOND)
    assert read_labels(page) == ["Start", "One", "Two", "Three", "Zwei"]


def test_tree_keyboard_navigation(page: Page) -> None:
    ask(page, "One")
    ask(page, "Two")
    get_tree_items(page).filter(has_text="One").click()
    ask(page, "Zwei")
    get_tree_items(page).filter(has_text="Zwei").focus()
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
        seen.append((label, get_tree_items(page).count()))
    assert seen == [
        ("Start", 4), ("One", 4), ("One", 2), ("One", 2), ("Start", 2),
        ("One", 2), ("One", 4), ("One", 2), ("One", 2),
    ]  # fmt: skip
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(get_turn(page, 1).locator(".question")).to_have_text("Two")
    expect(get_tree_items(page).filter(has_text="Two")).to_have_attribute("aria-selected", "true")
    expect(get_tree_items(page).filter(has_text="Two")).to_be_focused()


def test_retry_adds_second_answer(page: Page) -> None:
    page.evaluate("localStorage.setItem('fledge.settings', JSON.stringify({seed: '7', top_k: '3', stop: 'x\\ny'}))")
    page.reload()
    first = ask(page, "One")
    with page.expect_request(ENDPOINT) as request:
        get_turn(page, 0).get_by_role("button", name="Retry").click()
    wait_until_done(page)
    second = request.value.post_data_json
    assert (first["seed"], second["seed"]) == (7, 8)
    assert first["messages"] == second["messages"]
    assert (first["fledge"]["top_k"], first["stop"]) == (3, ["x", "y"])
    expect(get_turn(page, 0).locator(".branch-switcher")).to_contain_text("2/2")
    assert len(read_stored_turns(page)) == 2


def test_several_answers_are_shown_until_one_is_chosen(page: Page) -> None:
    ask(page, "One")
    page.get_by_label("Number of answers").select_option("3")
    assert ask(page, "Two")["n"] == 3
    expect(page.locator(".answer-choice .text")).to_have_text([SECOND] * 3)
    send(page, "Kept as draft")
    expect(page.locator("#notice")).to_contain_text("Choose")
    page.reload()
    expect(page.locator(".answer-choice .text")).to_have_text([SECOND] * 3)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Kept as draft")
    page.get_by_role("button", name="Continue with this answer").nth(1).click()
    page.get_by_label("Number of answers").select_option("1")
    states = [stored["state"] for stored in read_stored_turns(page)]
    assert len(set(states)) == len(states) == 4
    assert ask(page, "Three")["fledge"]["state"] == states[2]
    expect(get_turn(page, 2).locator(".text")).to_have_text(THIRD)


def test_states_and_trees_can_be_saved_and_opened(page: Page, browser: Browser, server: Server, tmp_path: Path) -> None:
    ask(page, "One")
    with page.expect_download() as state:
        page.get_by_role("button", name="Save state").click()
    with page.expect_download() as tree:
        page.get_by_role("button", name="Save as JSON").click()
    state.value.save_as(tmp_path / "one.state")
    tree.value.save_as(tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["turns"] == read_stored_turns(page)
    for other in open_page(browser, server):
        other.locator("#file-input").set_input_files(tmp_path / "one.state")
        expect(get_turn(other, 0)).to_contain_text("Continues from the state one")
        ask(other, "Two")
        expect(get_turn(other, 1).locator(".text")).to_have_text(SECOND)
        other.locator("#file-input").set_input_files(tmp_path / "one.json")
        expect(get_turn(other, 0).locator(".text")).to_have_text(FIRST)
        assert read_labels(other) == ["Start", "One", "State: one", "Two"]
        other.locator("#file-input").set_input_files({"name": "x.json", "mimeType": "text/json", "buffer": b'{"a": 1}'})
        expect(other.locator("#notice")).to_contain_text("not a conversation")
        other.locator("#file-input").set_input_files({"name": "x.state", "mimeType": "", "buffer": b"not a state file"})
        expect(other.locator("#notice")).not_to_contain_text("not a conversation")
        expect(other.locator("#notice")).not_to_be_empty()


def test_uploaded_state_keeps_its_template(page: Page, server: Server, tmp_path: Path) -> None:
    read = server.post("/v1/fledge/states", {"messages": [{"role": "user", "content": "One"}], "template": "instruct"})
    file = server.http.get(f"/v1/fledge/states/{read.json()['id']}/file").content
    page.locator("#file-input").set_input_files({"name": "one.state", "mimeType": "", "buffer": file})
    expect(get_turn(page, 0)).to_contain_text("Continues from the state one")
    assert ask(page, "Two")["fledge"]["template"] == "instruct"
    page.reload()
    assert ask(page, "Three")["fledge"]["template"] == "instruct"


def test_reload_restores_position_and_drafts(page: Page) -> None:
    ask(page, "One")
    ask(page, "Two")
    get_tree_items(page).filter(has_text="One").click()
    page.get_by_label("Message", exact=True).fill("An unsent")
    get_turn(page, 0).get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("Eins, unsent")
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)
    assert read_labels(page) == ["Start", "One", "Two"]
    expect(page.get_by_label("Message", exact=True)).to_have_value("An unsent")
    expect(page.get_by_label("Edited message")).to_have_value("Eins, unsent")
    page.keyboard.press("Escape")


def test_two_tabs_share_one_tree(page: Page, server: Server) -> None:
    other = page.context.new_page()
    other.goto(server.url)
    ask(page, "One")
    ask(other, "Uno")
    for tab in (page, other):
        expect(get_tree_items(tab)).to_have_count(3)
    page.reload()
    expect(get_turn(page, 0).locator(".question")).to_have_text("One")
    assert read_labels(page) == ["Start", "One", "Uno"]


def test_full_storage_shows_notice_and_page_keeps_working(page: Page) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    ask(page, "One")
    ask(page, "Two")
    expect(get_turn(page, 1).locator(".text")).to_have_text(SECOND)
    expect(page.locator("#notice")).to_contain_text("Save the conversation")
    with page.expect_download() as tree:
        page.get_by_role("button", name="Save as JSON").click()
    saved = json.loads(Path(tree.value.path()).read_text(encoding="utf-8"))
    assert [turn["user"] for turn in saved["turns"]] == ["One", "Two"]


def test_removing_branch_requires_confirmation(page: Page, server: Server) -> None:
    ask(page, "One")
    ask(page, "Two")
    state = read_stored_turns(page)[1]["state"]
    page.get_by_role("button", name="Remove branch").click()
    page.get_by_role("button", name="Cancel").click()
    assert read_labels(page) == ["Start", "One", "Two"]
    page.get_by_role("button", name="Remove branch").click()
    with page.expect_response("**/v1/fledge/states/*") as response:
        page.get_by_role("button", name="Remove", exact=True).click()
    assert response.value.ok and server.http.get(f"/v1/fledge/states/{state}").status_code == 404
    assert read_labels(page) == ["Start", "One"] and len(read_stored_turns(page)) == 1


def test_server_with_keys_requires_api_key(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nname = "alice"\nkey = "{KEY}"\n', encoding="utf-8")
    with serving(create_llm(PausableModel(FIRST)), tmp_path / "states", keys=tmp_path / "keys.toml") as server:
        for page in open_page(browser, server):
            expect(page.get_by_label("API key")).to_be_focused()
            send(page, "Let me in")
            expect(get_turn(page, 0).get_by_role("alert")).to_contain_text("key")
            expect(get_turn(page, 0).locator(".question")).to_have_text("Let me in")
            page.get_by_label("API key").fill("wrong")
            page.get_by_role("button", name="Use this key").click()
            expect(page.locator("#notice")).not_to_be_empty()
            page.get_by_label("API key").fill(KEY)
            page.get_by_role("button", name="Use this key").click()
            expect(get_turn(page, 0).locator(".text")).to_have_text(FIRST)
            expect(page.locator("#key-form")).to_be_hidden()
            page.reload()
            expect(page.locator("#model-name")).to_have_text("fake")
            assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_error_is_shown_at_its_turn_and_nothing_is_lost(page: Page) -> None:
    error = {"error": {"message": "the disk is full", "type": "server_error", "param": None, "code": None}}
    page.route(ENDPOINT, lambda route: route.fulfill(status=507, json=error))
    send(page, "Important question")
    expect(get_turn(page, 0).get_by_role("alert")).to_contain_text("the disk is full")
    expect(get_turn(page, 0).locator(".question")).to_have_text("Important question")
    page.unroute(ENDPOINT)
    page.route(ENDPOINT, lambda route: route.abort())
    get_turn(page, 0).get_by_role("button", name="Retry").click()
    expect(get_turn(page, 0).get_by_role("alert")).to_contain_text("cannot be reached")
    page.reload()
    expect(get_turn(page, 0).locator(".question")).to_have_text("Important question")
    mock_stream(page, make_chunk("Half"), {"error": {"message": "generation failed"}}, ends=False)
    get_turn(page, 0).get_by_role("button", name="Retry").click()
    expect(get_turn(page, 0).get_by_role("alert")).to_contain_text("generation failed")
    expect(get_turn(page, 0).locator(".text")).to_have_text("Half")
    page.unroute(ENDPOINT)
    get_turn(page, 0).get_by_role("alert").get_by_role("button", name="Retry").click()
    expect(get_turn(page, 0).locator(".text")).to_have_text(FIRST)
    assert len(read_stored_turns(page)) == 1


def test_deleted_state_is_recomputed_from_messages(page: Page, server: Server) -> None:
    ask(page, "One")
    ask(page, "Two")
    for stored in read_stored_turns(page):
        assert server.http.delete(f"/v1/fledge/states/{stored['state']}").status_code == 200
    bodies = list[dict[str, Any]]()
    page.on("request", lambda request: bodies.append(request.post_data_json))
    send(page, "Three")
    expect(get_turn(page, 2).locator(".text")).to_have_text(THIRD)
    wait_until_done(page)
    expect(page.locator("#notice")).to_contain_text("messages are processed again")
    assert [len(body["messages"]) for body in bodies] == [1, 5]
    assert "state" not in bodies[1]["fledge"] and read_stored_turns(page)[2]["state"].startswith("st_")


def test_server_without_states_receives_all_messages(browser: Browser) -> None:
    with serving(create_llm(PausableModel(FIRST, SECOND))) as server:
        for page in open_page(browser, server):
            expect(page.locator("#tree-note")).to_contain_text("processed again")
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("System prompt").fill("Be short.")
            ask(page, "One")
            sent = ask(page, "Two")
            assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
            assert sent["fledge"] == {"template": "world"}
            expect(get_turn(page, 1).locator(".text")).to_have_text(SECOND)


def test_conversation_keeps_its_template_and_system_prompt(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be short.")
    assert ask(page, "One")["fledge"]["template"] == "world"
    page.get_by_label("Template").select_option("qa")
    page.get_by_label("System prompt").fill("Be long.")
    assert ask(page, "Two")["fledge"]["template"] == "world"
    page.get_by_role("treeitem").nth(1).click()
    with page.expect_request(ENDPOINT) as request:
        get_turn(page, 0).get_by_role("button", name="Retry").click()
    wait_until_done(page)
    sent = request.value.post_data_json
    assert sent["messages"][0] == {"role": "system", "content": "Be short."} and sent["fledge"]["template"] == "world"


def mock_stream(page: Page, *events: dict[str, Any], ends: bool = True) -> None:
    """Answer the next requests with a stream of these events."""
    lines = [*map(json.dumps, events), *(["[DONE]"] if ends else [])]
    body = "".join(f"data: {line}\n\n" for line in lines)
    page.unroute(ENDPOINT)
    page.route(ENDPOINT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def make_chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def test_answers_are_never_parsed_as_html(browser: Browser, server: Server) -> None:
    for page in open_page(browser, server, viewport={"width": 360, "height": 700}):
        mock_stream(page, make_chunk(MARKDOWN[:30]), make_chunk(MARKDOWN[30:]))
        send(page, "<b>Show</b> it " + "wide" * 60)
        text = get_turn(page, 0).locator(".text")
        expect(text.locator("h3")).to_have_text("Title")
        expect(text.locator("strong")).to_have_text("bold")
        expect(text.locator("li")).to_have_text(["one", "two"])
        expect(text.locator("pre")).to_have_text("x = 1 < 2")
        expect(text.locator("img")).to_have_count(0)
        assert [link.get_attribute("href") for link in text.locator("a").all()] == ["https://example.org"]
        expect(get_turn(page, 0).locator(".question")).to_contain_text("<b>Show</b>")
        assert_no_horizontal_scroll(page)


def assert_no_horizontal_scroll(page: Page) -> None:
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")


def test_small_screen_uses_drawers_without_horizontal_scroll(browser: Browser, server: Server) -> None:
    for page in open_page(browser, server, viewport={"width": 360, "height": 640}):
        assert_no_horizontal_scroll(page)
        page.get_by_label("Number of answers").select_option("4")
        ask(page, "Averylongword" * 20)
        assert_no_horizontal_scroll(page)
        page.get_by_role("button", name="Continue with this answer").first.click()
        for name, title in (("Tree", "Tree"), ("State", "State"), ("Settings", "Settings")):
            page.get_by_role("button", name=name, exact=True).click()
            expect(page.locator(f"#{title.lower()}")).to_be_visible()
            expect(page.locator("aside:visible")).to_have_count(1)
            assert_no_horizontal_scroll(page)
            page.keyboard.press("Escape")
            expect(page.locator("aside:visible")).to_have_count(0)
        page.keyboard.press("Escape")


def test_scroll_position_is_kept_after_scrolling_up(browser: Browser) -> None:
    model = PausableModel(LONG)
    with serving(create_llm(model)) as server:
        for page in open_page(browser, server, viewport={"width": 400, "height": 500}):
            log = page.locator("#log")
            model.pause(after=700)
            send(page, "Count")
            expect(get_turn(page, 0).locator(".text")).to_contain_text("word " * 100)
            end = "element => element.scrollHeight - element.scrollTop - element.clientHeight"
            assert log.evaluate(end) < 60
            log.evaluate("element => { element.scrollTop = 40; }")
            expect(page.get_by_role("button", name="Jump to latest")).to_be_visible()
            model.resume()
            wait_until_done(page)
            assert log.evaluate("element => element.scrollTop") == 40
            page.get_by_role("button", name="Jump to latest").click()
            assert log.evaluate(end) < 2


def test_system_theme_applies_until_theme_is_chosen(browser: Browser, server: Server) -> None:
    for page in open_page(browser, server, color_scheme="dark"):
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(paper)
        page.get_by_role("button", name="Dark theme", pressed=True).click()
        light = page.evaluate(paper)
        assert light != dark
        page.reload()
        expect(page.get_by_role("button", name="Dark theme", pressed=False)).to_be_visible()
        assert page.evaluate(paper) == light


def test_keyboard_shortcuts(page: Page) -> None:
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
def inspectable_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a real model, which has heads to inspect."""
    with serving(random_llm(), tmp_path_factory.mktemp("inspectable")) as running:
        yield running


def test_state_panel_shows_heatmap_and_table(browser: Browser, inspectable_server: Server) -> None:
    for page in open_page(browser, inspectable_server):
        page.get_by_role("button", name="State", exact=True).click()
        expect(page.locator("#state-view")).to_contain_text("The state is empty")
        page.evaluate("localStorage.setItem('fledge.settings', JSON.stringify({max_tokens: '5'}))")
        page.reload()
        ask(page, "One")
        page.get_by_role("button", name="Refresh").click()
        expect(page.get_by_role("img", name="Heat map of half-lives: 2 layers with 4 heads")).to_be_visible()
        page.get_by_text("Show as table").first.click()
        expect(page.get_by_role("table", name="Half-lives").get_by_role("cell")).to_have_count(9)
        page.reload()
        expect(page.get_by_role("img", name="Heat map of half-lives")).to_be_visible()
        expect(page.locator(".segments li").first).to_contain_text("User: One")
        expect(page.get_by_role("meter").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_no_accessibility_violations(browser: Browser, inspectable_server: Server, scheme: str) -> None:
    for page in open_page(browser, inspectable_server, color_scheme=scheme, reduced_motion="reduce"):
        page.evaluate("localStorage.setItem('fledge.settings', JSON.stringify({max_tokens: '5'}))")
        page.reload()
        assert_accessible(page)
        ask(page, "One")
        ask(page, "Two")
        get_turn(page, 0).get_by_role("button", name="Edit").click()
        page.get_by_role("button", name="State", exact=True).click()
        expect(page.locator(".heatmap").first).to_be_visible()
        page.get_by_text("Show as table").first.click()
        assert_accessible(page)
        page.get_by_label("Number of answers").select_option("2")
        ask(page, "Several")
        page.get_by_role("button", name="Settings").click()
        page.route(ENDPOINT, lambda route: route.abort())
        assert_accessible(page)
        page.get_by_role("button", name="Continue with this answer").first.click()
        page.get_by_label("Number of answers").select_option("1")
        send(page, "Fails")
        expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
        page.locator("#key-form").evaluate("form => { form.hidden = false; }")
        assert_accessible(page)
        page.get_by_role("button", name="Help and keyboard shortcuts").click()
        assert_accessible(page)
        switch = page.get_by_role("button", name="Dark theme", include_hidden=True)
        assert switch.get_attribute("aria-pressed") == str(scheme == "dark").lower()


def assert_accessible(page: Page) -> None:
    """Check all accessibility rules. In the dark theme, only the contrast differs, so only contrast is checked."""
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    results = Axe().run(page, options={"runOnly": ["color-contrast"]} if dark else None)
    assert results.violations_count == 0, results.generate_report()
