"""States over HTTP: going on, branching, sessions, files; and nobody's state but one's own."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import TOKENIZER, Server, fake, key_file, random_model, serving

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
DRAWN = {"seed": 5, "max_tokens": 12, "top_p": 0.9, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model, so that every difference in what was read shows in the text."""
    with serving(random_model(), tmp_path_factory.mktemp("states")) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same for two tenants."""
    folder = tmp_path_factory.mktemp("shared")
    with serving(random_model(), folder, keys=key_file(folder, KEYS)) as running:
        yield running


def text_of(answer: dict[str, Any]) -> str:
    content = answer["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


@pytest.mark.parametrize("form", ["handle", "inline"])
def test_a_state_goes_on_as_the_whole_conversation_would(server: Server, form: str) -> None:
    first = server.ask("One?", fledge={"return_state": form}, stop=["e"], **DRAWN)
    (state,) = first["fledge"]["states"]
    assert state.startswith("st_") == (form == "handle")
    second = server.ask("Two?", fledge={"state": state}, **DRAWN)
    assert second["usage"]["prompt_tokens"] == len(TOKENIZER.encode("User: Two?\n\nAssistant:"))
    again = server.ask("Two?", fledge={"state": state}, **DRAWN)
    other = server.ask("Two?", **DRAWN)
    assert text_of(second) == text_of(again) != text_of(other)


def test_a_server_without_a_folder_keeps_nothing() -> None:
    with serving(fake(" one\n\n")) as plain:
        for options in ({"return_state": "handle"}, {"session": "talk"}):
            answer = plain.post("/v1/chat/completions", {"messages": chat("a"), "fledge": options, "temperature": 0})
            assert answer.status_code == 400 and "start it with --folder" in answer.json()["error"]["message"]
        inline = plain.ask("a", temperature=0, fledge={"return_state": "inline"})["fledge"]["states"][0]
        assert plain.ask("b", temperature=0, fledge={"state": inline})["usage"]["completion_tokens"] > 0


def test_branches_leave_each_other_alone(server: Server) -> None:
    root = server.ask("Root", fledge={"return_state": "handle"}, **DRAWN)["fledge"]["states"][0]
    expected = {word: text_of(server.ask(word, fledge={"state": root}, **DRAWN)) for word in ("left", "right")}
    for word in ("right", "left", "left", "right"):
        assert text_of(server.ask(word, fledge={"state": root}, **DRAWN)) == expected[word]
    choices = server.ask("n", fledge={"state": root, "return_state": "handle"}, n=3, **DRAWN)
    assert len(set(choices["fledge"]["states"])) == 3


def test_a_session_remembers(server: Server) -> None:
    def ask(text: str, session: str, **more: str) -> dict[str, Any]:
        return server.ask(text, fledge={"session": session, **more}, **DRAWN)

    one, two = ask("One?", "talk"), ask("Two?", "talk")
    branch = ask("Three?", "talk", branch="side")
    three = ask("Three?", "talk")
    assert text_of(branch) == text_of(three), "the branch began where the session stood"
    assert text_of(ask("Four?", "side")) == text_of(ask("Four?", "talk"))
    fresh = ask("One?", "other")
    assert text_of(fresh) == text_of(one) and text_of(two) != text_of(ask("Two?", "third"))
    for body, status in (
        ({"session": "talk", "branch": "side"}, 409),
        ({"session": "none", "branch": "new"}, 404),
        ({"session": "talk", "branch": "talk"}, 400),
        ({"branch": "new"}, 400),
        ({"session": "talk", "state": "st_x"}, 400),
    ):
        assert server.post("/v1/chat/completions", {"messages": chat("x"), "fledge": body}).status_code == status


def test_a_session_answers_one_request_at_a_time(server: Server) -> None:
    body = {"messages": chat("x"), "max_tokens": 3000, "seed": 1, "fledge": {"session": "slow"}}
    stream = server.stream("/v1/chat/completions", body)
    next(stream)
    busy = server.post("/v1/chat/completions", {**body, "max_tokens": 1})
    assert busy.status_code == 409 and busy.json()["error"]["param"] == "fledge.session"
    stream.close()


def test_documents_are_read_once_and_asked_often(server: Server) -> None:
    made = server.post("/v1/fledge/states", {"text": "A long book. " * 40, "name": "book"}).json()
    assert made["name"] == "book" and made["tokens"] == len(TOKENIZER.encode("A long book. " * 40))
    one = server.ask("Who?", fledge={"state": made["id"]}, **DRAWN)
    assert one["usage"]["prompt_tokens"] < 40
    listed = server.http.get("/v1/fledge/states").json()["data"]
    assert made["id"] in [entry["id"] for entry in listed] and listed[0]["created"] >= listed[-1]["created"]
    known = server.http.get(f"/v1/fledge/states/{made['id']}").json()
    assert known == made
    more = server.post("/v1/fledge/states", {"messages": chat("Hi", "Ho"), "state": made["id"]}).json()
    assert more["template"] == "world" and more["tokens"] > made["tokens"]
    view = server.http.get(f"/v1/fledge/states/{made['id']}/view").json()
    assert len(view["norms"]) == view["layers"] and len(view["norms"][0]) == view["heads"]
    gone = server.http.delete(f"/v1/fledge/states/{made['id']}")
    assert gone.json()["deleted"] is True
    forgotten = server.post("/v1/chat/completions", {"messages": chat("x"), "fledge": {"state": made["id"]}})
    assert forgotten.status_code == 404 and forgotten.json()["error"]["code"] == "state_not_found"
    missing = server.http.get(f"/v1/fledge/states/{made['id']}")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "state_not_found"


def test_a_state_travels_as_a_file(server: Server) -> None:
    made = server.post("/v1/fledge/states", {"text": "A letter.", "name": "letter"}).json()
    data = server.http.get(f"/v1/fledge/states/{made['id']}/file").content
    back = server.http.put("/v1/fledge/states/file", content=data)
    assert back.status_code == 201 and back.json()["tokens"] == made["tokens"] and back.json()["name"] == "letter"
    assert decode_state(data)[1].title == "letter"
    texts = {text_of(server.ask("Who?", fledge={"state": state}, **DRAWN)) for state in (made["id"], back.json()["id"])}
    assert len(texts) == 1
    inline = base64.b64encode(data).decode()
    assert text_of(server.ask("Who?", fledge={"state": inline}, **DRAWN)) in texts
    for forged in (data[:-1] + b"x", data[:100], b"", b"{}"):
        answer = server.http.put("/v1/fledge/states/file", content=forged)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"
        assert answer.json()["error"]["message"].startswith("the state cannot be used: it "), answer.text
        body = {"messages": chat("x"), "fledge": {"state": base64.b64encode(forged).decode() or "AA=="}}
        answer = server.post("/v1/chat/completions", body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "fledge.state"


def test_states_of_other_weights_are_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(server.service.secret)
    with serving(random_model(), tmp_path / "folder", "1" * 64, secret=tmp_path / "secret") as other:
        made = other.post("/v1/fledge/states", {"text": "A letter."}).json()
        data = other.http.get(f"/v1/fledge/states/{made['id']}/file").content
    answer = server.http.put("/v1/fledge/states/file", content=data)
    assert answer.status_code == 400 and "only with the weights that made it" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "handle", ["st_x", "st_x.y", "st_" + "a" * 22 + ".abcdefghijklmnop", "not base64!", "st_.", "st_\u00e9.\u00e9"]
)
def test_invented_handles_are_refused(server: Server, handle: str) -> None:
    answer = server.post("/v1/chat/completions", {"messages": chat("x"), "fledge": {"state": handle}})
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == "fledge.state"


def test_tenants_never_meet(shared: Server) -> None:
    """Both ask the same things in random order and at the same time: answers, states and cache are their own."""
    answers: dict[str, list[tuple[str, str, int]]] = {ALICE: [], BOB: []}
    handles: dict[str, list[str]] = {ALICE: [], BOB: []}

    def talk(key: str, seed: int) -> None:
        chooser, states = random.Random(seed), [""]
        for _ in range(12):
            state, word = chooser.choice(states), chooser.choice(["one", "two"])
            options = {"return_state": "handle"} | ({"state": state} if state else {"session": f"s{len(states)}"})
            answer = shared.ask(word, key, fledge=options, **DRAWN)
            states += answer["fledge"]["states"]
            place = handles[key].index(state) if state else -1
            answers[key].append((word, text_of(answer), place if state else -1))
            handles[key] += answer["fledge"]["states"]

    threads = [threading.Thread(target=talk, args=(key, 7)) for key in (ALICE, BOB)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[ALICE] == answers[BOB], "what one does changes nothing for the other"
    assert not set(handles[ALICE]) & set(handles[BOB])
    for key, foreign in ((ALICE, handles[BOB]), (BOB, handles[ALICE])):
        answer = shared.post("/v1/chat/completions", {"messages": chat("x"), "fledge": {"state": foreign[0]}}, key)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "state_not_found"
        headers = {"authorization": f"Bearer {key}"}
        listed = shared.http.get("/v1/fledge/states", headers=headers).json()["data"]
        assert {entry["id"] for entry in listed} <= set(handles[key])
        for path in ("", "/file", "/view"):
            assert shared.http.get(f"/v1/fledge/states/{foreign[0]}{path}", headers=headers).status_code == 404
        assert shared.http.delete(f"/v1/fledge/states/{foreign[0]}", headers=headers).status_code == 404


def test_the_cache_is_not_shared_between_tenants(shared: Server) -> None:
    long = "a question of many words " * 8
    cached = [
        shared.ask(long, key, **DRAWN)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in (ALICE, BOB, BOB, ALICE)
    ]
    assert cached[0] == cached[1] == 0 and cached[2] > 100 and cached[3] > 100


def test_of_two_servers_one_goes_on_with_a_session(tmp_path: Path) -> None:
    """Both read where it stands, both write; the later one is told that its answer is no part of it."""
    body = {"messages": chat("x"), "max_tokens": 3, "seed": 1, "fledge": {"session": "talk"}}
    with serving(random_model(), shared=tmp_path) as one, serving(random_model(), shared=tmp_path) as two:
        for _ in range(2):  # a session that begins, and one that goes on
            events = one.stream("/v1/chat/completions", {**body, "max_tokens": 600})
            next(events)
            quick = two.post("/v1/chat/completions", {**body, "fledge": {"session": "talk", "return_state": "handle"}})
            error = next(event["error"] for event in events if "error" in event)
            assert quick.status_code == 200 and error["param"] == "fledge.session", error
            assert error["type"] == "conflict_error" and "ask again" in error["message"]
            (state,) = quick.json()["fledge"]["states"]
            expected = text_of(two.ask("Who?", fledge={"state": state}, **DRAWN))
            assert text_of(one.ask("Who?", fledge={"session": "talk"}, **DRAWN)) == expected


def test_what_the_model_reads_can_be_seen(server: Server) -> None:
    seen = server.post("/v1/fledge/render", {"messages": chat("Hi", "Ho", "Who?")}).json()
    assert seen["text"] == "User: Hi\n\nAssistant: Ho\n\nUser: Who?\n\nAssistant:"
    view = server.post("/v1/fledge/view", {"messages": chat("Hi", "Ho", "Who?")}).json()
    assert "".join(piece["text"] for piece in view["pieces"]) == "User: Hi\n\nAssistant: Ho\n\nUser: Who?"
    assert all(len(piece["change"]) == 2 and len(piece["change"][0]) == 4 for piece in view["pieces"])
    assert len(view["half_lives"]) == 2 and min(map(min, view["half_lives"])) > 0


def test_states_outlive_the_server(tmp_path: Path) -> None:
    with serving(random_model(), tmp_path) as first:
        state = first.ask("One?", fledge={"return_state": "handle", "session": "talk"}, **DRAWN)["fledge"]["states"][0]
        expected = text_of(first.ask("Two?", fledge={"state": state}, **DRAWN))
        prompt = "x" * 200
        assert first.ask(prompt, **DRAWN)["fledge"]["cached_tokens"] == 0
    with serving(random_model(), tmp_path) as second:
        assert text_of(second.ask("Two?", fledge={"state": state}, **DRAWN)) == expected
        assert text_of(second.ask("Two?", fledge={"session": "talk"}, **DRAWN)) == expected
        assert second.ask(prompt, **DRAWN)["fledge"]["cached_tokens"] > 200
