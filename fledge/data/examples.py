"""Fine-tuning examples: JSON lines of texts or conversations as token ids with a loss mask.

    {"text": "..."}                                             all tokens and the end of the text count in the loss
    {"messages": [{"role": "user", "content": "..."}, ...]}     only the answers and their closing blank lines count

A conversation is encoded to the ids that `fledge chat` reads and generates. It is encoded in the same segments as in
fledge.engine.llm.chat: the opening, each question up to the start of the answer, the answer with its leading space, the
separator. Messages after the last answer are omitted. Other keys of a line ("lang", "src") are ignored.

Each example is one row that starts from the initial state. A batch contains rows of similar length, padded on the right
with ids that do not count.
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
from fledge.data.documents import read_numbered_lines
from fledge.tokenizer import NO_EOS, ChatTemplate, Tokenizer, template_named
from fledge.tokenizer.chat_template import ASSISTANT, SEPARATOR, normalize

PAD_ID = 0
"""The id of padding. Its value has no effect, because padding follows all tokens that count."""

POOL_BATCHES = 16
"""Batches whose examples are sorted by length together. More reduce the padding, fewer shuffle better."""

LENGTH_MULTIPLE = 16
"""The length of a batch is a multiple of this, so that few different shapes occur."""


@dataclass(frozen=True, eq=False)
class Example:
    """One row: ids and, for each id, whether it counts in the loss. The first id never counts."""

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    line: int  # number of its line in the file, from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """The examples of a file, and the lines that were truncated or dropped."""

    path: Path
    items: tuple[Example, ...]
    truncated_lines: tuple[int, ...] = ()  # numbers of the lines that exceeded the length limit
    truncated_tokens: int = 0
    dropped_lines: tuple[int, ...] = ()  # numbers of the lines without any target after truncation
    conversations: int = 0  # number of conversations in `items`
    joined_lines: tuple[int, ...] = ()  # the line number of each message whose blank lines were removed

    @property
    def tokens(self) -> int:
        """Number of ids."""
        return sum(len(example) for example in self.items)

    @property
    def loss_tokens(self) -> int:
        """Number of ids that count in the loss."""
        return sum(int(example.loss_mask.sum()) for example in self.items)


def read_examples(path: Path, tokenizer: Tokenizer, *, template: str = "world", length: int = 1024) -> Examples:
    """The examples of a .jsonl file (also compressed), truncated to `length` inputs, which is `length` + 1 ids.

    Raises UsageError for a file without examples, and with file and line number for an invalid line.
    """
    if length < 1:
        raise UsageError(f"length is {length}; it must be at least 1")
    chat_template = template_named(template)
    items: list[Example] = []
    truncated: list[int] = []
    dropped: list[int] = []
    joined: list[int] = []
    truncated_tokens = conversations = 0
    _check_path(path)
    for number, line in _read_lines(path):
        full, messages = _parse_example(line, number, tokenizer, chat_template, f"{path}, line {number}")
        if len(full) > length + 1:
            truncated.append(number)
            truncated_tokens += len(full) - length - 1
        example = Example(full.ids[: length + 1], full.loss_mask[: length + 1], number)
        if not example.loss_mask.any():
            dropped.append(number)
            continue
        items.append(example)
        conversations += bool(messages)
        joined += [number for _, content in messages if _has_blank_lines(content)]
    if dropped and not items:
        problem = f"truncated to {length} tokens, none of its {len(dropped)} examples has a token to learn"
        raise UsageError(f"{path}: {problem}; raise --length, or shorten the questions")
    if not items:
        raise UsageError(f'{path}: no examples; each line must be a JSON object with "text" or "messages"')
    return Examples(
        path, tuple(items), tuple(truncated), truncated_tokens, tuple(dropped), conversations, tuple(joined)
    )


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give one file of JSON lines (.jsonl)")
    if not path.exists():
        raise UsageError(f"there is no file {path}; give a JSON lines file (.jsonl) with texts or messages")


def _has_blank_lines(content: str) -> bool:
    """Whether `normalize` removes blank lines from within a message."""
    return SEPARATOR in content.replace("\r\n", "\n").replace("\r", "\n").strip()


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank."""
    for number, line in read_numbered_lines(path):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            yield number, text


Messages = list[tuple[str, str]]
"""(role, content)."""


def _parse_example(
    line: bytes, number: int, tokenizer: Tokenizer, template: ChatTemplate, location: str
) -> tuple[Example, Messages]:
    """The example of a line before truncation, and its messages (none for a text)."""
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{location}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{location}: not JSON: {error}; each line must contain one complete object") from None
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise UsageError(
            f'{location}: needs an object with either "text" or "messages", found {_describe_keys(record)}'
        )
    messages = _parse_messages(record["messages"], template, location) if "messages" in record else []
    try:
        if messages:
            segments = _encode_chat(messages, tokenizer, template)
        else:
            segments = _encode_text(record["text"], tokenizer, location)
    except TokenizerError as error:
        raise UsageError(f"{location}: {error}") from None
    ids = np.array([token for segment, _ in segments for token in segment], dtype=np.int32)
    loss_mask = np.array([counts for segment, counts in segments for _ in segment], dtype=np.bool_)
    loss_mask[:1] = False
    return Example(ids, loss_mask, number), messages


def _describe_keys(record: Any) -> str:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}"
    return ", ".join(f"{key!r:.30}" for key in list(record)[:5]) or "an empty object"


Segments = list[tuple[list[int], bool]]
"""(ids, whether they count in the loss)."""


def _encode_text(text: Any, tokenizer: Tokenizer, location: str) -> Segments:
    if not isinstance(text, str) or not text:
        raise UsageError(f'{location}: "text" must be a text that is not empty')
    end = [] if tokenizer.eos_id == NO_EOS else [tokenizer.eos_id]
    return [(tokenizer.encode(text), True), (end, True)]


def _parse_messages(messages: Any, template: ChatTemplate, location: str) -> Messages:
    """The validated messages up to the last answer."""
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{location}: "messages" must be a list with at least one message')
    parsed = [_parse_message(message, number, template, location) for number, message in enumerate(messages)]
    answers = [number for number, (role, _) in enumerate(parsed) if role == ASSISTANT]
    if not answers:
        raise UsageError(f"{location}: there is nothing to learn; at least one message needs the role {ASSISTANT!r}")
    for number, (role, content) in enumerate(parsed):
        if not normalize(content) and role not in template.optional:
            raise UsageError(f"{location}: message {number} ({role}) is empty")
    return parsed[: answers[-1] + 1]


def _parse_message(message: Any, number: int, template: ChatTemplate, location: str) -> tuple[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(f'{location}: message {number} needs a "role" and a "content" that are texts')
    if role not in template.labels:
        roles = ", ".join(template.labels)
        raise UsageError(f"{location}: template {template.name!r} has no role {role!r:.30}; roles: {roles}")
    return role, content


def _encode_chat(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, template: ChatTemplate) -> Segments:
    """Encode messages in the same segments as fledge.engine.Chat, so that the ids are the same."""
    segments: Segments = []
    cue = template.turn(ASSISTANT, "")
    turns = [(role, content) for role, content in messages if role == ASSISTANT or normalize(content)]
    for number, (role, content) in enumerate(turns):
        if role == ASSISTANT:
            if number == 0 or turns[number - 1][0] == ASSISTANT:
                segments.append((tokenizer.encode(cue), False))
            answer = template.turn(ASSISTANT, content).removeprefix(cue)
            segments += [(tokenizer.encode(answer), True), (tokenizer.encode(template.close_turn()), True)]
            continue
        is_answered = turns[number + 1][0] == ASSISTANT
        text = template.turn(role, content) + template.close_turn() + (cue if is_answered else "")
        segments.append((tokenizer.encode(text), False))
    return segments


@dataclass(frozen=True)
class ExampleBatches:
    """Padded batches of `batch` examples. Each epoch contains every example once, in an order drawn from the seed.

    Batch number n is a pure function of (seed, n), so a run can resume at any batch with the same data. The last batch
    of an epoch may be smaller.
    """

    examples: Sequence[Example]
    batch: int
    seed: int
    _plans: dict[int, list[npt.NDArray[np.int64]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.examples:
            raise UsageError(
                f"the batch size is {self.batch} and there are {len(self.examples)} examples; both must be at least 1"
            )

    @property
    def per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return -(-len(self.examples) // self.batch)

    def __getitem__(self, number: int) -> Batch:
        epoch, position = divmod(number, self.per_epoch)
        if epoch not in self._plans:
            self._plans.clear()  # only the plan of the current epoch is kept
            self._plans[epoch] = self._plan_epoch(epoch)
        return pad_examples([self.examples[index] for index in self._plans[epoch][position]])

    def _plan_epoch(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The indices of the examples in each batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.examples))
        lengths = np.array([len(example) for example in self.examples])
        batches: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), self.batch * POOL_BATCHES):
            pool = order[start : start + self.batch * POOL_BATCHES]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[first : first + self.batch] for first in range(0, len(pool), self.batch)]
        return [batches[index] for index in rng.permutation(len(batches))]

    @property
    def padding(self) -> float:
        """The fraction of ids that are padding, in the first epoch."""
        return 1 - sum(len(example) for example in self.examples) / sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Number of ids of each batch of the first epoch, including padding."""
        lengths = [len(example) for example in self.examples]
        return [len(rows) * _round_up_length(max(lengths[row] for row in rows)) for rows in self._plan_epoch(0)]


def pad_examples(examples: Sequence[Example]) -> Batch:
    """The batch of some examples, padded to one length."""
    length = _round_up_length(max(len(example) for example in examples))
    idx = torch.full((len(examples), length), PAD_ID, dtype=torch.long)
    loss_mask = torch.zeros(len(examples), length - 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        idx[row, : len(example)] = torch.from_numpy(example.ids.astype(np.int64))
        loss_mask[row, : len(example) - 1] = torch.from_numpy(example.loss_mask[1:])
    return Batch(idx, loss_mask)


def _round_up_length(longest: int) -> int:
    """The padded number of ids for a longest example of `longest` ids: a multiple of LENGTH_MULTIPLE, plus one."""
    return -(-(longest - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE + 1


def split_by_loss_mask(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example as (text, whether it counts in the loss). The end-of-text id is shown as `<end>`."""
    runs: list[tuple[str, bool]] = []
    edges = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example)]
    for start, end in pairwise(edges):
        ids = example.ids[start:end].tolist()
        has_end = tokenizer.eos_id != NO_EOS and ids[-1] == tokenizer.eos_id
        runs.append((tokenizer.decode(ids) + ("<end>" if has_end else ""), bool(example.loss_mask[start])))
    return runs
