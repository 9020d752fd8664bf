"""The last stages over shards: count the used World tokens, and tokenize the parts that the plan uses.

The tokens of a shard are written with the length of each part, so that the store is assembled by copying.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.errors import ConfigError, TokenizerError
from fledge.core.files import read_json, write_json
from fledge.data.pipeline.counts import Count, Counts
from fledge.data.pipeline.mixture.plan import ASSIGNMENTS, HELD_OUT, TRAIN, MixtureAssignment, MixturePlan, assign_parts
from fledge.data.pipeline.shards import Shard
from fledge.data.pipeline.stage_outputs import StageContext, atomic_folder, load_array, save_array
from fledge.data.store import SEPARATOR
from fledge.tokenizer import Tokenizer, Vocabulary, load_world, prune, tokenizer_for, world_vocabulary

BATCH_BYTES = 4_000_000
LENGTHS_DTYPE = np.dtype([("tokens", "<i4"), ("times", "<u4")])


@dataclass(frozen=True)
class ShardTask:
    """One shard with its part of the plan, and the specification of the vocabulary."""

    shard: Shard
    plan: MixturePlan
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the outputs of the task."""
        return self.shard.name


def resolve_vocabulary(vocabulary: str | int, base: Path) -> dict[str, Any] | None:
    """The specification of the vocabulary in a config; None if its tokens have to be counted first."""
    if isinstance(vocabulary, int):
        return None
    if vocabulary == "world":
        return world_vocabulary().to_spec()
    try:
        loaded = Vocabulary.from_spec(read_json(base / vocabulary))
    except (OSError, ValueError, TokenizerError) as error:
        raise ConfigError(f"vocabulary {vocabulary} cannot be used: {error}") from None
    if loaded.kind == "bytes":
        raise ConfigError(f"vocabulary {vocabulary} has no id to separate documents; use World or a part of it")
    return loaded.to_spec()


def count_tokens(context: StageContext, task: ShardTask) -> None:
    """Stage function: write how often each World token is used in the training text of a shard."""
    assignment = assign_parts(context, task.shard, task.plan)
    used = np.zeros(65536, dtype=np.int64)
    for texts in _read_batches(task.shard, np.flatnonzero(assignment.codes == TRAIN)):
        for ids in load_world().encode_batch_arrays(texts, threads=1):
            used += np.bincount(ids, minlength=len(used))
    save_array(context.folder("used") / f"{task.name}.npy", used)


def prune_to_most_used(context: StageContext, size: int) -> dict[str, Any]:
    """The specification of World pruned to `size` ids: the end of text, the 256 bytes, and the most used tokens."""
    used = np.zeros(65536, dtype=np.int64)
    for path in sorted(context.folder("used").glob("[0-9]*.npy")):
        used += load_array(path)
    multi_byte = 257 + np.flatnonzero(used[257:])
    kept = multi_byte[np.lexsort((multi_byte, -used[multi_byte]))][: size - 257]
    return prune(world_vocabulary(), kept.tolist(), size=size).to_spec()


def tokenize_shard(context: StageContext, task: ShardTask) -> None:
    """Stage function: write the tokens, lengths and counts of a shard."""
    shard = task.shard
    assignment = assign_parts(context, shard, task.plan)
    tokenizer = _get_tokenizer(task.spec)
    chosen = np.flatnonzero(assignment.codes == TRAIN)
    lengths = np.zeros(len(chosen), dtype=LENGTHS_DTYPE)
    lengths["times"] = assignment.times[chosen]
    with atomic_folder(context.folder("tokens") / task.name) as folder:
        written = 0
        with open(folder / "train.bin", "wb") as file:
            for texts in _read_batches(shard, chosen):
                for ids in tokenizer.encode_batch_arrays(texts, threads=1):
                    file.write(_encode_with_separator(ids, tokenizer))
                    lengths["tokens"][written] = len(ids) + 1
                    written += 1
        assert written == len(chosen)
        save_array(folder / "train.npy", lengths)
        records = _write_validation(folder / "validation.bin", task, assignment, tokenizer)
        write_json(folder / "validation.json", records)
        write_json(folder / "counts.json", _count_documents(shard, assignment, lengths, records).rows())


def _write_validation(
    path: Path, task: ShardTask, assignment: MixtureAssignment, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Write the tokens of the beginning of each held-out document. Returns the records of these documents."""
    shard = task.shard
    held_out = task.plan.held_out.get(shard.number, {})
    parts = shard.parts
    # Duplicates are never held out, so the code of these documents is HELD_OUT.
    first = np.flatnonzero((assignment.codes == HELD_OUT) & (parts["part"] == 0))
    records = []
    with open(path, "wb") as file, shard.open_text() as texts:
        for index in first.tolist():
            texts.seek(int(parts["start"][index]))
            document = int(parts["document"][index])
            data = texts.read(held_out[document]).decode(errors="ignore").encode()
            ids = tokenizer.encode_array(data)
            file.write(_encode_with_separator(ids, tokenizer))
            language, source = shard.kinds[parts["kind"][index]]
            records.append({"language": language, "source": source, "bytes": len(data), "tokens": len(ids) + 1})
    return records


def _encode_with_separator(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> bytes:
    return np.append(ids, SEPARATOR).astype(choose_work_dtype(tokenizer.vocab_size)).tobytes()


def choose_work_dtype(vocab_size: int) -> npt.DTypeLike:
    """The dtype of tokens in the work folder."""
    return "<u2" if vocab_size <= 1 << 16 else "<i4"


_TOKENIZERS: dict[str, Tokenizer] = {}


def _get_tokenizer(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a vocabulary. Each process keeps the last one."""
    key = str(sorted(spec.items()))
    if key not in _TOKENIZERS:
        _TOKENIZERS.clear()
        _TOKENIZERS[key] = tokenizer_for(spec)
    return _TOKENIZERS[key]


def _read_batches(shard: Shard, chosen: npt.NDArray[np.int64]) -> Iterator[list[bytes]]:
    """The texts of the chosen parts, in batches of about BATCH_BYTES bytes."""
    parts = shard.parts
    texts: list[bytes] = []
    size = 0
    with shard.open_text() as file:
        for start, length in zip(parts["start"][chosen].tolist(), parts["size"][chosen].tolist(), strict=True):
            file.seek(start)
            texts.append(file.read(length))
            size += length
            if size >= BATCH_BYTES:
                yield texts
                texts, size = [], 0
    if texts:
        yield texts


def _count_documents(
    shard: Shard, assignment: MixtureAssignment, lengths: npt.NDArray[Any], records: Sequence[dict[str, Any]]
) -> Counts:
    """The counts of the documents of a shard by assignment. A document is counted at its first part."""
    counts = Counts()
    parts = shard.parts
    is_first = parts["part"] == 0
    for code, stage in enumerate(ASSIGNMENTS):
        if code == HELD_OUT:
            continue
        has_code = assignment.codes == code
        for number, (language, source) in enumerate(shard.kinds):
            selected = has_code & (parts["kind"] == number)
            if selected.any():
                size = int(parts["size"][selected].sum())
                counts.add(stage, language, source, Count(int(np.count_nonzero(selected & is_first)), size))
    chosen = assignment.codes == TRAIN
    for number, (language, source) in enumerate(shard.kinds):
        selected = parts["kind"][chosen] == number
        if selected.any():
            times = lengths["times"][selected].astype(np.int64)
            sizes = parts["size"][chosen][selected].astype(np.int64)
            tokens = lengths["tokens"][selected].astype(np.int64)
            total = Count(int(times.sum()), int((times * sizes).sum()), int((times * tokens).sum()))
            counts.add("stored", language, source, total)
    for record in records:
        counts.add("validation", record["language"], record["source"], Count(1, record["bytes"], record["tokens"]))
    return counts
