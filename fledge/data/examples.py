"""Examples to tune on: JSON lines of texts or conversations, as ids with a mask of what is to be learnt.

    {"text": "..."}                                             every token counts, and the end of the text
    {"messages": [{"role": "user", "content": "..."}, ...]}     the answers count, with the blank line that ends each

A conversation becomes the very ids that `fledge chat` reads and writes (fledge.engine.llm.chat says how it cuts a text
into
pieces): the opening, each question up to where the answer begins, the answer with its space in front, the separator.
Whatever follows the last answer teaches nothing and is left out. Other keys of a line ("lang", "src") are ignored.

Each example is a row of its own that begins at a fresh state; rows of about the same length share a batch and are
padded on the right, where nothing counts. Not here: models, and the loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fledge.core.errors import TokenizerError, UsageError
from fledge.data.batches import Batch
from fledge.data.documents import numbered_lines
from fledge.tokenizer import NO_EOS, ChatTemplate, Tokenizer, template_named
from fledge.tokenizer.chat_template import ASSISTANT, SEPARATOR, normalize

PAD = 0
"""What fills a row. Any id would do: it is read after everything that counts."""

POOL = 16
"""Batches whose examples are sorted by length together: more save padding, fewer mix better."""

STEP = 16
"""Lengths of batches are multiples of this, so that few different sizes occur."""


@dataclass(frozen=True, eq=False)
class Example:
    """One row: ids, and for each whether predicting it counts (never the first, which nothing precedes)."""

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    line: int  # of the file, from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """What a file gave, and what of it was lost to the limit of length."""

    path: Path
    items: tuple[Example, ...]
    cut: tuple[int, ...] = ()  # numbers of the lines that were too long and lost their end
    cut_tokens: int = 0
    dropped: tuple[int, ...] = ()  # numbers of the lines without any target after truncation
    conversations: int = 0  # among `items`
    joined: tuple[int, ...] = ()  # for each message with blank lines, which no turn can hold, the number of its line

    @property
    def tokens(self) -> int:
        """All ids."""
        return sum(len(example) for example in self.items)

    @property
    def counted_tokens(self) -> int:
        """The ids that are to be learnt."""
        return sum(int(example.loss_mask.sum()) for example in self.items)


def read_examples(path: Path, tokenizer: Tokenizer, *, template: str = "world", length: int = 1024) -> Examples:
    """The examples of a .jsonl file (also compressed), cut to `length` ids that are read and one that is predicted.

    Raises UsageError for a file without examples, and with file and number for a bad line.
    """
    if length < 1:
        raise UsageError(f"length is {length}; it must be at least 1")
    form = template_named(template)
    items: list[Example] = []
    cut: list[int] = []
    dropped: list[int] = []
    joined: list[int] = []
    cut_tokens = conversations = 0
    _check_there(path)
    for number, line in _lines(path):
        whole, messages = _example(line, number, tokenizer, form, f"{path}, line {number}")
        if len(whole) > length + 1:
            cut.append(number)
            cut_tokens += len(whole) - length - 1
        example = Example(whole.ids[: length + 1], whole.loss_mask[: length + 1], number)
        if not example.loss_mask.any():
            dropped.append(number)
            continue
        items.append(example)
        conversations += bool(messages)
        joined += [number for _, content in messages if _has_blank_lines(content)]
    if dropped and not items:
        what = f"cut to {length} tokens, none of its {len(dropped)} examples has anything to learn"
        raise UsageError(f"{path}: {what}; raise --length, or give shorter questions")
    if not items:
        raise UsageError(f"{path}: no examples; give JSON lines with a text or with messages each")
    return Examples(path, tuple(items), tuple(cut), cut_tokens, tuple(dropped), conversations, tuple(joined))


def _check_there(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give one file of JSON lines (.jsonl)")
    if not path.exists():
        raise UsageError(f"there is no file {path}; give one of JSON lines (.jsonl), a text or messages each")


def _has_blank_lines(content: str) -> bool:
    """Whether `normalize` takes blank lines out of the inside of a message."""
    return SEPARATOR in content.replace("\r\n", "\n").replace("\r", "\n").strip()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    for number, line in numbered_lines(path):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            yield number, text


Messages = list[tuple[str, str]]
"""(role, content)."""


def _example(
    line: bytes, number: int, tokenizer: Tokenizer, form: ChatTemplate, where: str
) -> tuple[Example, Messages]:
    """The whole example of a line, and the messages it is made of; none for a text."""
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}; each line needs one whole object") from None
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise UsageError(f'{where}: needs an object with either "text" or "messages", found {_keys(record)}')
    messages = _messages(record["messages"], form, where) if "messages" in record else []
    try:
        pieces = _chat_pieces(messages, tokenizer, form) if messages else _text_pieces(record["text"], tokenizer, where)
    except TokenizerError as error:
        raise UsageError(f"{where}: {error}") from None
    ids = np.array([token for piece, _ in pieces for token in piece], dtype=np.int32)
    loss_mask = np.array([counts for piece, counts in pieces for _ in piece], dtype=np.bool_)
    loss_mask[:1] = False
    return Example(ids, loss_mask, number), messages


def _keys(record: Any) -> str:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}"
    return ", ".join(f"{key!r:.30}" for key in list(record)[:5]) or "an empty object"


Pieces = list[tuple[list[int], bool]]
"""Ids, and whether they count."""


def _text_pieces(text: Any, tokenizer: Tokenizer, where: str) -> Pieces:
    if not isinstance(text, str) or not text:
        raise UsageError(f'{where}: "text" must be a text that is not empty')
    end = [] if tokenizer.eos_id == NO_EOS else [tokenizer.eos_id]
    return [(tokenizer.encode(text), True), (end, True)]


def _messages(messages: Any, form: ChatTemplate, where: str) -> Messages:
    """(role, content), checked, up to the last answer."""
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{where}: "messages" must be a list with at least one message')
    found = [_message(message, at, form, where) for at, message in enumerate(messages)]
    answers = [at for at, (role, _) in enumerate(found) if role == ASSISTANT]
    if not answers:
        raise UsageError(f"{where}: no message is the {ASSISTANT}'s, so there is nothing to learn")
    for at, (role, content) in enumerate(found):
        if not normalize(content) and role not in form.optional:
            raise UsageError(f"{where}: message {at} ({role}) is empty")
    return found[: answers[-1] + 1]


def _message(message: Any, at: int, form: ChatTemplate, where: str) -> tuple[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(f'{where}: message {at} needs a "role" and a "content" that are texts')
    if role not in form.labels:
        raise UsageError(
            f"{where}: role {role!r:.30} is unknown to template {form.name!r}; roles: {', '.join(form.labels)}"
        )
    return role, content


def _chat_pieces(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, form: ChatTemplate) -> Pieces:
    """The pieces that fledge.engine.Chat encodes one by one, so that the ids are the same."""
    pieces: Pieces = []
    said = [(role, content) for role, content in messages if role == ASSISTANT or normalize(content)]
    for at, (role, content) in enumerate(said):
        if role == ASSISTANT:
            if at == 0 or said[at - 1][0] == ASSISTANT:
                pieces.append((tokenizer.encode(form.turn(ASSISTANT, "")), False))
            answer = form.turn(ASSISTANT, content).removeprefix(form.turn(ASSISTANT, ""))
            pieces += [(tokenizer.encode(answer), True), (tokenizer.encode(form.close_turn()), True)]
            continue
        opens = said[at + 1][0] == ASSISTANT
        text = form.turn(role, content) + form.close_turn() + (form.turn(ASSISTANT, "") if opens else "")
        pieces.append((tokenizer.encode(text), False))
    return pieces


@dataclass(frozen=True)
class ExampleBatches:
    """Padded batches of `batch` examples each, every example once an epoch, in an order drawn from the seed.

    Batch number n is a pure function of (seed, n), so a run can stop anywhere and continue with the same data. The last
    batch of an epoch may be smaller.
    """

    examples: Sequence[Example]
    batch: int
    seed: int
    _plans: dict[int, list[npt.NDArray[np.int64]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.examples:
            count = len(self.examples)
            raise UsageError(f"batches need a size of at least 1 and some examples, not {self.batch} and {count}")

    @property
    def per_epoch(self) -> int:
        """Batches of one epoch."""
        return -(-len(self.examples) // self.batch)

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, self.per_epoch)
        if epoch not in self._plans:
            self._plans.clear()  # of another epoch; only the present one is kept
            self._plans[epoch] = self._plan(epoch)
        return padded([self.examples[at] for at in self._plans[epoch][place]])

    def _plan(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Which examples make up each batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.examples))
        lengths = np.array([len(example) for example in self.examples])
        full: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), self.batch * POOL):
            pool = order[start : start + self.batch * POOL]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            full += [pool[at : at + self.batch] for at in range(0, len(pool), self.batch)]
        return [full[at] for at in rng.permutation(len(full))]

    @property
    def padding(self) -> float:
        """The share of places that hold nothing, over the first epoch."""
        return 1 - sum(len(example) for example in self.examples) / sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Places of each batch of the first epoch, those that hold nothing included."""
        lengths = [len(example) for example in self.examples]
        return [len(rows) * _width(max(lengths[at] for at in rows)) for rows in self._plan(0)]


def padded(rows: Sequence[Example]) -> Batch:
    """Rows as one batch."""
    width = _width(max(len(row) for row in rows))
    idx = torch.full((len(rows), width), PAD, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for at, row in enumerate(rows):
        idx[at, : len(row)] = torch.from_numpy(row.ids.astype(np.int64))
        loss_mask[at, : len(row) - 1] = torch.from_numpy(row.loss_mask[1:])
    return Batch(idx, loss_mask)


def _width(longest: int) -> int:
    """Width of a row for a longest example of this length: its inputs are a multiple of STEP."""
    return -(-(longest - 1) // STEP) * STEP + 1


def marked_text(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example in runs that count, and runs that do not; the end-of-text id shows as `<end>`."""
    runs: list[tuple[str, bool]] = []
    edges = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example)]
    for start, end in pairwise(edges):
        ids = example.ids[start:end].tolist()
        ended = tokenizer.eos_id != NO_EOS and ids[-1] == tokenizer.eos_id
        runs.append((tokenizer.decode(ids) + ("<end>" if ended else ""), bool(example.loss_mask[start])))
    return runs
