"""Pieces of streams, as bytes."""

from __future__ import annotations

import json

from fledge.server.responses import encode_event


def test_an_event_is_one_line_to_every_client() -> None:
    text = "a\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\u597d\U0001f426" + '"\\'
    sent = encode_event({"text": text}).decode()
    assert sent.endswith("\n\n") and len(sent.rstrip("\n").splitlines()) == 1
    assert json.loads(sent.removeprefix("data: ")) == {"text": text}
    assert "\u597d" in sent, "letters are sent as they are"
