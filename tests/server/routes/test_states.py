"""Saved states over HTTP: continuing, branching, sessions and files. Tenants are isolated from each other."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import CHAT, STATES, TOKENIZER, Server, random_llm, scripted_llm, serving, write_key_file

from fledge.engine.states.state_file import decode_state

KEYS = """
[[keys]]
name = "alice"
key = "alice-0123456789abcdef"
[[keys]]
name = "bob"
key = "bob-0123456789abcdefgh"
"""
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdefgh"
SAMPLING = {"seed": 5, "max_tokens": 12, "top_p": 0.9, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a random model, because any difference in what it has read changes its text."""
    with serving(random_llm(), tmp_path_factory.mktemp("states")) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With two tenants."""
    folder = tmp_path_factory.mktemp("keyed")
    with serving(random_llm(), folder, keys=write_key_file(folder, KEYS)) as running:
        yield running


def get_text(response: dict[str, Any]) -> str:
    content = response["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def make_messages(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


@pytest.mark.parametrize("form", ["handle", "inline"])
def test_a_state_continues_a_conversation(server: Server, form: str) -> None:
    first = server.ask("One?", fledge={"return_state": form}, stop=["e"], **SAMPLING)
    (state,) = first["fledge"]["states"]
    assert state.startswith("st_") == (form == "handle")
    second = server.ask("Two?", fledge={"state": state}, **SAMPLING)
    assert second["usage"]["prompt_tokens"] == len(TOKENIZER.encode("User: Two?\n\nAssistant:"))
    repeated = server.ask("Two?", fledge={"state": state}, **SAMPLING)
    without_state = server.ask("Two?", **SAMPLING)
    assert get_text(second) == get_text(repeated) != get_text(without_state)


def test_a_server_without_a_folder_saves_no_states() -> None:
    with serving(scripted_llm(" one\n\n")) as server:
        for options in ({"return_state": "handle"}, {"session": "talk"}):
            response = server.post(CHAT, {"messages": make_messages("a"), "fledge": options, "temperature": 0})
            assert response.status_code == 400 and "start it with --folder" in response.json()["error"]["message"]
        inline = server.ask("a", temperature=0, fledge={"return_state": "inline"})["fledge"]["states"][0]
        assert server.ask("b", temperature=0, fledge={"state": inline})["usage"]["completion_tokens"] > 0


def test_branches_are_independent(server: Server) -> None:
    root = server.ask("Root", fledge={"return_state": "handle"}, **SAMPLING)["fledge"]["states"][0]
    expected = {word: get_text(server.ask(word, fledge={"state": root}, **SAMPLING)) for word in ("left", "right")}
    for word in ("right", "left", "left", "right"):
        assert get_text(server.ask(word, fledge={"state": root}, **SAMPLING)) == expected[word]
    response = server.ask("n", fledge={"state": root, "return_state": "handle"}, n=3, **SAMPLING)
    assert len(set(response["fledge"]["states"])) == 3


def test_sessions_and_branches(server: Server) -> None:
    def ask(text: str, session: str, **options: str) -> dict[str, Any]:
        return server.ask(text, fledge={"session": session, **options}, **SAMPLING)

    one, two = ask("One?", "talk"), ask("Two?", "talk")
    branch = ask("Three?", "talk", branch="side")
    three = ask("Three?", "talk")
    assert get_text(branch) == get_text(three), "the branch starts at the state of the session"
    assert get_text(ask("Four?", "side")) == get_text(ask("Four?", "talk"))
    other = ask("One?", "other")
    assert get_text(other) == get_text(one) and get_text(two) != get_text(ask("Two?", "third"))
    for body, status in (
        ({"session": "talk", "branch": "side"}, 409),
        ({"session": "none", "branch": "new"}, 404),
        ({"session": "talk", "branch": "talk"}, 400),
        ({"branch": "new"}, 400),
        ({"session": "talk", "state": "st_x"}, 400),
    ):
        assert server.post(CHAT, {"messages": make_messages("x"), "fledge": body}).status_code == status


def test_a_session_answers_one_request_at_a_time(server: Server) -> None:
    body = {"messages": make_messages("x"), "max_tokens": 3000, "fledge": {"session": "slow", "ban": [0]}}
    stream = server.stream(CHAT, body)
    next(stream)
    response = server.post(CHAT, {**body, "max_tokens": 1})
    assert response.status_code == 409 and response.json()["error"]["param"] == "fledge.session"
    stream.close()


def test_a_document_is_read_once(server: Server) -> None:
    text = "A long book. " * 40
    saved = server.post(STATES, {"text": text, "name": "book"}).json()
    assert saved["name"] == "book" and saved["tokens"] == len(TOKENIZER.encode(text))
    assert server.ask("Who?", fledge={"state": saved["id"]}, **SAMPLING)["usage"]["prompt_tokens"] < 40
    listed = server.http.get(STATES).json()["data"]
    assert saved["id"] in [entry["id"] for entry in listed] and listed[0]["created"] >= listed[-1]["created"]
    assert server.http.get(f"{STATES}/{saved['id']}").json() == saved
    extended = server.post(STATES, {"messages": make_messages("Hi", "Ho"), "state": saved["id"]}).json()
    assert extended["template"] == "world" and extended["tokens"] > saved["tokens"]
    view = server.http.get(f"{STATES}/{saved['id']}/view").json()
    assert len(view["norms"]) == view["layers"] and len(view["norms"][0]) == view["heads"]


def test_a_deleted_state_is_not_found(server: Server) -> None:
    handle = server.post(STATES, {"text": "A letter."}).json()["id"]
    assert server.http.delete(f"{STATES}/{handle}").json()["deleted"] is True
    for response in (
        server.post(CHAT, {"messages": make_messages("x"), "fledge": {"state": handle}}),
        server.http.get(f"{STATES}/{handle}"),
    ):
        assert response.status_code == 404 and response.json()["error"]["code"] == "state_not_found"


def test_a_downloaded_state_can_be_uploaded(server: Server) -> None:
    saved = server.post(STATES, {"text": "A letter.", "name": "letter"}).json()
    data = server.http.get(f"{STATES}/{saved['id']}/file").content
    response = server.http.put(f"{STATES}/file", content=data)
    uploaded = response.json()
    assert response.status_code == 201 and uploaded["tokens"] == saved["tokens"] and uploaded["name"] == "letter"
    assert decode_state(data).metadata.title == "letter"
    inline = base64.b64encode(data).decode()
    states = (saved["id"], uploaded["id"], inline)
    assert len({get_text(server.ask("Who?", fledge={"state": state}, **SAMPLING)) for state in states}) == 1


def test_damaged_state_files_are_rejected(server: Server) -> None:
    handle = server.post(STATES, {"text": "A letter."}).json()["id"]
    data = server.http.get(f"{STATES}/{handle}/file").content
    for damaged in (data[:-1] + b"x", data[:100], b"", b"{}"):
        response = server.http.put(f"{STATES}/file", content=damaged)
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "file"
        assert error["message"].startswith("the state cannot be used: it "), error
        options = {"state": base64.b64encode(damaged).decode() or "AA=="}
        response = server.post(CHAT, {"messages": make_messages("x"), "fledge": options})
        assert response.status_code == 400 and response.json()["error"]["param"] == "fledge.state"


def test_states_of_other_weights_are_rejected(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(server.service.secret)
    with serving(random_llm(), tmp_path / "folder", "1" * 64, secret=tmp_path / "secret") as other:
        handle = other.post(STATES, {"text": "A letter."}).json()["id"]
        data = other.http.get(f"{STATES}/{handle}/file").content
    response = server.http.put(f"{STATES}/file", content=data)
    assert response.status_code == 400 and "only with the weights that made it" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "handle", ["st_x", "st_x.y", "st_" + "a" * 22 + ".abcdefghijklmnop", "not base64!", "st_.", "st_\u00e9.\u00e9"]
)
def test_forged_handles_are_rejected(server: Server, handle: str) -> None:
    response = server.post(CHAT, {"messages": make_messages("x"), "fledge": {"state": handle}})
    assert response.status_code in (400, 404) and response.json()["error"]["param"] == "fledge.state"


def test_tenants_are_isolated(keyed: Server) -> None:
    """Two tenants send the same requests concurrently. Each has its own answers, states and cache."""
    answers: dict[str, list[tuple[str, str, int]]] = {ALICE: [], BOB: []}
    handles: dict[str, list[str]] = {ALICE: [], BOB: []}

    def send_requests(key: str) -> None:
        random_source, states = random.Random(7), [""]
        for _ in range(12):
            state, word = random_source.choice(states), random_source.choice(["one", "two"])
            options = {"return_state": "handle"} | ({"state": state} if state else {"session": f"s{len(states)}"})
            response = keyed.ask(word, key, fledge=options, **SAMPLING)
            states += response["fledge"]["states"]
            answers[key].append((word, get_text(response), handles[key].index(state) if state else -1))
            handles[key] += response["fledge"]["states"]

    threads = [threading.Thread(target=send_requests, args=(key,)) for key in (ALICE, BOB)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[ALICE] == answers[BOB], "neither affects the other"
    assert not set(handles[ALICE]) & set(handles[BOB])
    for key, foreign in ((ALICE, handles[BOB]), (BOB, handles[ALICE])):
        response = keyed.post(CHAT, {"messages": make_messages("x"), "fledge": {"state": foreign[0]}}, key)
        assert response.status_code == 404 and response.json()["error"]["code"] == "state_not_found"
        headers = {"authorization": f"Bearer {key}"}
        listed = keyed.http.get(STATES, headers=headers).json()["data"]
        assert {entry["id"] for entry in listed} <= set(handles[key])
        for path in ("", "/file", "/view"):
            assert keyed.http.get(f"{STATES}/{foreign[0]}{path}", headers=headers).status_code == 404
        assert keyed.http.delete(f"{STATES}/{foreign[0]}", headers=headers).status_code == 404


def test_tenants_do_not_share_the_prefix_cache(keyed: Server) -> None:
    question = "a question of many words " * 8
    cached_tokens = [
        keyed.ask(question, key, **SAMPLING)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in (ALICE, BOB, BOB, ALICE)
    ]
    assert cached_tokens[0] == cached_tokens[1] == 0 and cached_tokens[2] > 100 and cached_tokens[3] > 100


def test_two_servers_cannot_update_the_same_session(tmp_path: Path) -> None:
    """Both start from the same state of the session. The one that ends later gets an error."""
    body = {"messages": make_messages("x"), "max_tokens": 3, "seed": 1, "fledge": {"session": "talk"}}
    with serving(random_llm(), shared=tmp_path) as slow, serving(random_llm(), shared=tmp_path) as fast:
        for _ in range(2):  # a new session, then an existing one
            events = slow.stream(CHAT, {**body, "max_tokens": 600})
            next(events)
            response = fast.post(CHAT, {**body, "fledge": {"session": "talk", "return_state": "handle"}})
            error = next(event["error"] for event in events if "error" in event)
            assert response.status_code == 200 and error["param"] == "fledge.session", error
            assert error["type"] == "conflict_error" and "send the request again" in error["message"]
            (state,) = response.json()["fledge"]["states"]
            expected = get_text(fast.ask("Who?", fledge={"state": state}, **SAMPLING))
            assert get_text(slow.ask("Who?", fledge={"session": "talk"}, **SAMPLING)) == expected


def test_rendered_prompts_and_changes_per_segment(server: Server) -> None:
    messages = make_messages("Hi", "Ho", "Who?")
    prompt = server.post("/v1/fledge/render", {"messages": messages}).json()
    assert prompt["text"] == "User: Hi\n\nAssistant: Ho\n\nUser: Who?\n\nAssistant:"
    view = server.post("/v1/fledge/view", {"messages": messages}).json()
    assert "".join(segment["text"] for segment in view["pieces"]) == "User: Hi\n\nAssistant: Ho\n\nUser: Who?"
    assert all(len(segment["change"]) == 2 and len(segment["change"][0]) == 4 for segment in view["pieces"])
    assert len(view["half_lives"]) == 2 and min(map(min, view["half_lives"])) > 0


def test_states_sessions_and_the_cache_outlive_the_server(tmp_path: Path) -> None:
    options, question = {"return_state": "handle", "session": "talk"}, "x" * 200
    with serving(random_llm(), tmp_path) as server:
        (state,) = server.ask("One?", fledge=options, **SAMPLING)["fledge"]["states"]
        expected = get_text(server.ask("Two?", fledge={"state": state}, **SAMPLING))
        assert server.ask(question, **SAMPLING)["fledge"]["cached_tokens"] == 0
    with serving(random_llm(), tmp_path) as server:
        assert get_text(server.ask("Two?", fledge={"state": state}, **SAMPLING)) == expected
        assert get_text(server.ask("Two?", fledge={"session": "talk"}, **SAMPLING)) == expected
        assert server.ask(question, **SAMPLING)["fledge"]["cached_tokens"] > 200
