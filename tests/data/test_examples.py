"""Examples: the ids of `fledge chat`, a mask on the answers, losses to length counted, bad lines named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import ByteTokenizer, FakeModel

from fledge.core.errors import UsageError
from fledge.data.examples import STEP, Example, ExampleBatches, Examples, marked_text, padded, read_examples
from fledge.engine import Chat
from fledge.tokenizer import byte_vocabulary, load_world, tokenizer_for

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are\n\nyou?"},
    {"role": "assistant", "content": "A finch."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "On a\nbranch. "},
]


def written(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def only(folder: Path, record: Any, **options: Any) -> Example:
    (example,) = read_examples(written(folder, record), load_world(), **options).items
    return example


def test_a_conversation_is_what_chat_reads(tmp_path: Path) -> None:
    """The model of the chat answers as the example does; then both have the same ids."""
    tokenizer = ByteTokenizer("\n\n", "Assistant:", " A", "you?\n", ":")
    replies = [[*tokenizer.encode(text), tokenizer.id_of("\n\n")] for text in (" A finch.", " On a\nbranch.")]
    model = FakeModel(replies, tokenizer.id_of("Assistant:"), tokenizer.vocab_size)
    chat = Chat(model, tokenizer, model.initial_state(1), system="Be brief.")
    for turn in (TALK[1], TALK[3]):
        for _ in chat.say(turn["content"]):
            pass
    (example,) = read_examples(written(tmp_path, {"messages": TALK}), tokenizer).items
    assert tuple(example.ids.tolist()) == chat.ids
    assert "".join(text for text, _ in marked_text(example, tokenizer)) == chat.transcript


def test_the_answers_count_with_what_ends_them(tmp_path: Path) -> None:
    tokenizer = load_world()
    assert marked_text(only(tmp_path, {"messages": TALK}), tokenizer) == [
        ("System: Be brief.\n\nUser: Who are\nyou?\n\nAssistant:", False),
        (" A finch.\n\n", True),
        ("User: Where?\n\nAssistant:", False),
        (" On a\nbranch.\n\n", True),
    ]
    tail = [*TALK, {"role": "user", "content": "Thanks"}]
    assert np.array_equal(only(tmp_path, {"messages": tail}).ids, only(tmp_path, {"messages": TALK}).ids)
    first = only(tmp_path, {"messages": [TALK[2], TALK[1], TALK[2], TALK[4]]})
    assert marked_text(first, tokenizer)[:2] == [("Assistant:", False), (" A finch.\n\n", True)]
    assert [counts for _, counts in marked_text(first, tokenizer)] == [False, True, False, True, False, True]


def test_messages_that_lose_blank_lines_are_counted(tmp_path: Path) -> None:
    """They are read as a chat reads them: test_a_conversation_is_what_chat_reads has one."""
    answers = [
        {"role": "assistant", "content": text} for text in ("One.\r\n\r\nTwo.", "\n\nOne.\nTwo.\n\n", "a\n\n\nb")
    ]
    late = {"role": "user", "content": "after\n\nthe last answer"}
    path = written(tmp_path, {"messages": TALK}, {"text": "a\n\nb"}, {"messages": [TALK[1], *answers, late]})
    found = read_examples(path, load_world())
    assert found.joined == (1, 3, 3, 3) and found.conversations == 2
    assert "One.\nTwo.\n\n" in marked_text(found.items[2], load_world())[1][0]


def test_templates(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Add"}, {"role": "input", "content": "1 2"}, TALK[2]]
    example = only(tmp_path, {"messages": messages, "lang": "en"}, template="instruct")
    text = "Instruction: Add\n\nInput: 1 2\n\nResponse:"
    assert marked_text(example, load_world()) == [(text, False), (" A finch.\n\n", True)]
    messages[1]["content"] = " "
    example = only(tmp_path, {"messages": messages}, template="instruct")
    assert marked_text(example, load_world())[0] == ("Instruction: Add\n\nResponse:", False)


def test_of_a_text_everything_counts_but_its_first_token(tmp_path: Path) -> None:
    example = only(tmp_path, {"text": "The sea was calm."})
    assert example.ids.tolist() == [*load_world().encode("The sea was calm."), 0]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)
    assert marked_text(example, load_world())[-1] == (" sea was calm.<end>", True)
    tokenizer = tokenizer_for(byte_vocabulary())
    (example,) = read_examples(written(tmp_path, {"text": "abc"}), tokenizer).items
    assert example.ids.tolist() == [97, 98, 99] and marked_text(example, tokenizer) == [("a", False), ("bc", True)]


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "why " * 30}, TALK[2]]}
    path = written(tmp_path, {"text": "abcdefgh"}, long, {"text": "abcd"}, {"messages": TALK[1:3]})
    found = read_examples(path, tokenizer_for(byte_vocabulary()), length=39)
    assert [len(example) for example in found.items] == [8, 4, 40]
    assert [example.line for example in found.items] == [1, 3, 4]
    assert found.cut == (2, 4) and found.dropped == (2,) and found.conversations == 1
    assert found.cut_tokens == (len("User: \n\nAssistant: A finch.\n\n") + len(("why " * 30).strip()) - 40) + 1
    assert found.tokens == 52 and found.counted_tokens == 7 + 3 + 10
    with pytest.raises(
        UsageError, match="cut to 5 tokens, none of its 1 examples has anything to learn; raise --length"
    ):
        read_examples(written(tmp_path, {"messages": TALK}), load_world(), length=5)


def test_compressed_files_empty_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert [example.line for example in read_examples(tmp_path / name, load_world()).items] == [1, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a}', "not JSON: Unterminated string"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "needs an object.*found a JSON list"),
        ('{"prompt": "a", "answer": "b"}', "either \"text\" or \"messages\", found 'prompt', 'answer'"),
        ('{"text": "a", "messages": []}', "needs an object with either"),
        ('{"text": 3}', '"text" must be a text'),
        ('{"text": ""}', '"text" must be a text that is not empty'),
        ('{"text": "\\ud800"}', "line 2: .*surrogate"),
        ("[", "not JSON: .*; each line needs one whole object"),
        ("null", "needs an object .* found a JSON NoneType"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": {"role": "user"}}', '"messages" must be a list'),
        ('{"messages": [["user", "x"]]}', 'message 0 needs a "role" and a "content"'),
        ('{"messages": [{"role": "user", "content": null}]}', 'message 0 needs a "role" and a "content"'),
        ('{"messages": [{"role": "user"}]}', 'message 0 needs a "role" and a "content"'),
        ('{"messages": ["hello"]}', "message 0 needs"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot' is unknown to template 'world'; roles: system"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message is the assistant's"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \\n"}]}',
            r"message 1 \(assistant\) is empty",
        ),
        ('{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}', "message 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"data\.jsonl, line 2: .*{message.removeprefix('line 2: ')}"):
        read_examples(tmp_path / "data.jsonl", load_world())


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(UsageError, match=r"data\.jsonl, line 2: not UTF-8: invalid start byte at byte 10"):
        read_examples(tmp_path / "data.jsonl", load_world())
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 99)[:-12])
    with pytest.raises(UsageError, match=r"cut\.jsonl\.gz: cannot be read beyond line \d"):
        read_examples(tmp_path / "cut.jsonl.gz", load_world())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"empty\.jsonl: no examples"):
        read_examples(tmp_path / "empty.jsonl", load_world())
    with pytest.raises(UsageError, match=r"there is no file .*gone\.jsonl; give one of JSON lines"):
        read_examples(tmp_path / "gone.jsonl", load_world())
    with pytest.raises(UsageError, match="is a folder; give one file"):
        read_examples(tmp_path, load_world())
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"cannot read '\.csv' files"):
        read_examples(tmp_path / "a.csv", load_world())
    with pytest.raises(UsageError, match="length is 0"):
        read_examples(tmp_path / "empty.jsonl", load_world(), length=0)


def numbered(lengths: list[int]) -> tuple[Example, ...]:
    """Examples that can be told apart: example number n is made of id n + 1, and its second half counts."""
    return tuple(
        Example(np.full(size, at + 1, np.int32), np.arange(size) >= max(size // 2, 1), at + 1)
        for at, size in enumerate(lengths)
    )


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    batches = ExampleBatches(numbered([2 + (7 * n) % 90 for n in range(103)]), 4, seed=5)
    assert batches.per_epoch == 26
    orders = []
    for epoch in range(2):
        seen = [batches[epoch * 26 + number].idx[:, 0].tolist() for number in range(26)]
        assert sorted(id for batch in seen for id in batch) == list(range(1, 104))
        orders.append(seen)
    assert orders[0] != orders[1]
    again = ExampleBatches(batches.examples, 4, seed=5)
    for number in (30, 3, 51):  # in any order
        assert torch.equal(again[number].idx, batches[number].idx)
    assert not torch.equal(ExampleBatches(batches.examples, 4, seed=6)[0].idx, batches[0].idx)
    assert 0 < batches.padding < 0.25


def test_rows_are_padded_where_nothing_counts() -> None:
    batch = padded(numbered([3, STEP + 2]))
    assert batch.idx.shape == (2, 2 * STEP + 1) and batch.document_start is None
    assert batch.loss_mask is not None and batch.loss_mask.shape == (2, 2 * STEP)
    assert batch.idx[0].tolist() == [1, 1, 1] + [0] * (2 * STEP - 2)
    assert batch.loss_mask[0].tolist() == [True, True] + [False] * (2 * STEP - 2)
    assert batch.loss_mask[1].sum() == 9 and not batch.loss_mask[1, STEP + 1 :].any()
    assert padded(numbered([STEP + 1])).idx.shape == (1, STEP + 1)


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="a size of at least 1"):
        ExampleBatches(numbered([3]), 0, 0)
    with pytest.raises(UsageError, match="some examples"):
        ExampleBatches((), 2, 0)
    assert Examples(Path("a"), ()).tokens == 0
