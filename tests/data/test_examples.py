"""Fine-tuning examples: ids equal to those of `fledge chat`, the loss mask, truncation, errors, and batches."""

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
from fledge.data.examples import (
    LENGTH_MULTIPLE,
    Example,
    ExampleBatches,
    Examples,
    pad_examples,
    read_examples,
    split_by_loss_mask,
)
from fledge.engine import Chat
from fledge.tokenizer import byte_vocabulary, load_world, tokenizer_for

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are\n\nyou?"},
    {"role": "assistant", "content": "A finch."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "On a\nbranch. "},
]


def write_records(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_example(folder: Path, record: Any, **options: Any) -> Example:
    (example,) = read_examples(write_records(folder, record), load_world(), **options).items
    return example


def test_a_conversation_has_the_ids_of_a_chat(tmp_path: Path) -> None:
    """The chat model gives the answers of the example. The chat and the example then have the same ids."""
    tokenizer = ByteTokenizer("\n\n", "Assistant:", " A", "you?\n", ":")
    replies = [[*tokenizer.encode(text), tokenizer.get_id("\n\n")] for text in (" A finch.", " On a\nbranch.")]
    model = FakeModel(replies, tokenizer.get_id("Assistant:"), tokenizer.vocab_size)
    chat = Chat(model, tokenizer, model.initial_state(1), system="Be brief.")
    for turn in (CONVERSATION[1], CONVERSATION[3]):
        for _ in chat.say(turn["content"]):
            pass
    (example,) = read_examples(write_records(tmp_path, {"messages": CONVERSATION}), tokenizer).items
    assert tuple(example.ids.tolist()) == chat.ids
    assert "".join(text for text, _ in split_by_loss_mask(example, tokenizer)) == chat.transcript


def test_answers_and_their_closing_lines_count(tmp_path: Path) -> None:
    tokenizer = load_world()
    assert split_by_loss_mask(read_example(tmp_path, {"messages": CONVERSATION}), tokenizer) == [
        ("System: Be brief.\n\nUser: Who are\nyou?\n\nAssistant:", False),
        (" A finch.\n\n", True),
        ("User: Where?\n\nAssistant:", False),
        (" On a\nbranch.\n\n", True),
    ]
    tail = [*CONVERSATION, {"role": "user", "content": "Thanks"}]
    assert np.array_equal(
        read_example(tmp_path, {"messages": tail}).ids, read_example(tmp_path, {"messages": CONVERSATION}).ids
    )
    first = read_example(tmp_path, {"messages": [CONVERSATION[2], CONVERSATION[1], CONVERSATION[2], CONVERSATION[4]]})
    assert split_by_loss_mask(first, tokenizer)[:2] == [("Assistant:", False), (" A finch.\n\n", True)]
    assert [counts for _, counts in split_by_loss_mask(first, tokenizer)] == [False, True, False, True, False, True]


def test_messages_with_removed_blank_lines_are_reported(tmp_path: Path) -> None:
    """A chat removes them too: CONVERSATION has one in test_a_conversation_has_the_ids_of_a_chat."""
    answers = [
        {"role": "assistant", "content": text} for text in ("One.\r\n\r\nTwo.", "\n\nOne.\nTwo.\n\n", "a\n\n\nb")
    ]
    late = {"role": "user", "content": "after\n\nthe last answer"}
    path = write_records(
        tmp_path, {"messages": CONVERSATION}, {"text": "a\n\nb"}, {"messages": [CONVERSATION[1], *answers, late]}
    )
    examples = read_examples(path, load_world())
    assert examples.joined_lines == (1, 3, 3, 3) and examples.conversations == 2
    assert "One.\nTwo.\n\n" in split_by_loss_mask(examples.items[2], load_world())[1][0]


def test_examples_use_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Add"}, {"role": "input", "content": "1 2"}, CONVERSATION[2]]
    example = read_example(tmp_path, {"messages": messages, "lang": "en"}, template="instruct")
    text = "Instruction: Add\n\nInput: 1 2\n\nResponse:"
    assert split_by_loss_mask(example, load_world()) == [(text, False), (" A finch.\n\n", True)]
    messages[1]["content"] = " "
    example = read_example(tmp_path, {"messages": messages}, template="instruct")
    assert split_by_loss_mask(example, load_world())[0] == ("Instruction: Add\n\nResponse:", False)


def test_all_tokens_of_a_text_count_except_the_first(tmp_path: Path) -> None:
    example = read_example(tmp_path, {"text": "The sea was calm."})
    assert example.ids.tolist() == [*load_world().encode("The sea was calm."), 0]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)
    assert split_by_loss_mask(example, load_world())[-1] == (" sea was calm.<end>", True)
    tokenizer = tokenizer_for(byte_vocabulary())
    (example,) = read_examples(write_records(tmp_path, {"text": "abc"}), tokenizer).items
    assert example.ids.tolist() == [97, 98, 99] and split_by_loss_mask(example, tokenizer) == [
        ("a", False),
        ("bc", True),
    ]


def test_long_examples_are_truncated_and_reported(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "why " * 30}, CONVERSATION[2]]}
    path = write_records(tmp_path, {"text": "abcdefgh"}, long, {"text": "abcd"}, {"messages": CONVERSATION[1:3]})
    examples = read_examples(path, tokenizer_for(byte_vocabulary()), length=39)
    assert [len(example) for example in examples.items] == [8, 4, 40]
    assert [example.line for example in examples.items] == [1, 3, 4]
    assert examples.truncated_lines == (2, 4) and examples.dropped_lines == (2,) and examples.conversations == 1
    assert examples.truncated_tokens == (len("User: \n\nAssistant: A finch.\n\n") + len(("why " * 30).strip()) - 40) + 1
    assert examples.tokens == 52 and examples.loss_tokens == 7 + 3 + 10
    with pytest.raises(
        UsageError, match="truncated to 5 tokens, none of its 1 examples has a token to learn; raise --length"
    ):
        read_examples(write_records(tmp_path, {"messages": CONVERSATION}), load_world(), length=5)


def test_reads_compressed_files_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
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
        ("[", "not JSON: .*; each line must contain one complete object"),
        ("null", "needs an object .* found a JSON NoneType"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": {"role": "user"}}', '"messages" must be a list'),
        ('{"messages": [["user", "x"]]}', 'message 0 needs a "role" and a "content"'),
        ('{"messages": [{"role": "user", "content": null}]}', 'message 0 needs a "role" and a "content"'),
        ('{"messages": [{"role": "user"}]}', 'message 0 needs a "role" and a "content"'),
        ('{"messages": ["hello"]}', "message 0 needs"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "template 'world' has no role 'bot'; roles: system"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "at least one message needs the role 'assistant'"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \\n"}]}',
            r"message 1 \(assistant\) is empty",
        ),
        ('{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}', "message 0"),
    ],
)
def test_errors_name_the_invalid_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"data\.jsonl, line 2: .*{message.removeprefix('line 2: ')}"):
        read_examples(tmp_path / "data.jsonl", load_world())


def test_errors_name_the_invalid_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(UsageError, match=r"data\.jsonl, line 2: not UTF-8: invalid start byte at byte 10"):
        read_examples(tmp_path / "data.jsonl", load_world())
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 99)[:-12])
    with pytest.raises(UsageError, match=r"cut\.jsonl\.gz: cannot be read beyond line \d"):
        read_examples(tmp_path / "cut.jsonl.gz", load_world())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"empty\.jsonl: no examples"):
        read_examples(tmp_path / "empty.jsonl", load_world())
    with pytest.raises(UsageError, match=r"there is no file .*gone\.jsonl; give a JSON lines file"):
        read_examples(tmp_path / "gone.jsonl", load_world())
    with pytest.raises(UsageError, match="is a folder; give one file"):
        read_examples(tmp_path, load_world())
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"cannot read '\.csv' files"):
        read_examples(tmp_path / "a.csv", load_world())
    with pytest.raises(UsageError, match="length is 0"):
        read_examples(tmp_path / "empty.jsonl", load_world(), length=0)


def make_examples(lengths: list[int]) -> tuple[Example, ...]:
    """Distinct examples: example number n contains only id n, and its second half counts."""
    return tuple(
        Example(np.full(size, number, np.int32), np.arange(size) >= max(size // 2, 1), number)
        for number, size in enumerate(lengths, 1)
    )


def test_each_epoch_contains_every_example_once_in_a_new_order() -> None:
    batches = ExampleBatches(make_examples([2 + (7 * n) % 90 for n in range(103)]), 4, seed=5)
    assert batches.per_epoch == 26
    orders = []
    for epoch in range(2):
        order = [batches[epoch * 26 + number].idx[:, 0].tolist() for number in range(26)]
        assert sorted(id for batch in order for id in batch) == list(range(1, 104))
        orders.append(order)
    assert orders[0] != orders[1]
    again = ExampleBatches(batches.examples, 4, seed=5)
    for number in (30, 3, 51):  # in any order
        assert torch.equal(again[number].idx, batches[number].idx)
    assert not torch.equal(ExampleBatches(batches.examples, 4, seed=6)[0].idx, batches[0].idx)
    assert 0 < batches.padding < 0.25


def test_padding_does_not_count() -> None:
    batch = pad_examples(make_examples([3, LENGTH_MULTIPLE + 2]))
    assert batch.idx.shape == (2, 2 * LENGTH_MULTIPLE + 1) and batch.document_start is None
    assert batch.loss_mask is not None and batch.loss_mask.shape == (2, 2 * LENGTH_MULTIPLE)
    assert batch.idx[0].tolist() == [1, 1, 1] + [0] * (2 * LENGTH_MULTIPLE - 2)
    assert batch.loss_mask[0].tolist() == [True, True] + [False] * (2 * LENGTH_MULTIPLE - 2)
    assert batch.loss_mask[1].sum() == 9 and not batch.loss_mask[1, LENGTH_MULTIPLE + 1 :].any()
    assert pad_examples(make_examples([LENGTH_MULTIPLE + 1])).idx.shape == (1, LENGTH_MULTIPLE + 1)


def test_empty_batches_are_refused() -> None:
    with pytest.raises(UsageError, match="the batch size is 0"):
        ExampleBatches(make_examples([3]), 0, 0)
    with pytest.raises(UsageError, match="there are 0 examples; both must be at least 1"):
        ExampleBatches((), 2, 0)
    assert Examples(Path("a"), ()).tokens == 0
