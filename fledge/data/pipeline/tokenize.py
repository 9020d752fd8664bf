"""The last stages over shards: count how often World's tokens are used, and encode what the plan has chosen.

A shard's tokens are left behind with the size of each part, so that putting a store together is copying. Here: these
two stage functions, and which vocabulary a config asks for. Not here: choosing (plan.py), the store (assembly.py).
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
from fledge.data.pipeline.mixture.plan import ASIDE, TRAIN, VERDICTS, MixtureAssignment, MixturePlan, judge
from fledge.data.pipeline.shards import Shard
from fledge.data.pipeline.stage_outputs import StageContext, load_array, save_array, whole_folder
from fledge.data.store import SEPARATOR
from fledge.tokenizer import Tokenizer, Vocabulary, load_world, prune, tokenizer_for, world_vocabulary

BATCH_BYTES = 4_000_000
LENGTHS = np.dtype([("tokens", "<i4"), ("times", "<u4")])


@dataclass(frozen=True)
class ShardPortion:
    """One shard with its part of the plan, and the vocabulary's record."""

    shard: Shard
    plan: MixturePlan
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """Of what it leaves behind."""
        return self.shard.name


def fixed_spec(vocabulary: str | int, base: Path) -> dict[str, Any] | None:
    """The record of the vocabulary that a config names; None where it has to be counted first."""
    if isinstance(vocabulary, int):
        return None
    if vocabulary == "world":
        return world_vocabulary().to_spec()
    try:
        found = Vocabulary.from_spec(read_json(base / vocabulary))
    except (OSError, ValueError, TokenizerError) as error:
        raise ConfigError(f"vocabulary {vocabulary} cannot be used: {error}") from None
    if found.kind == "bytes":
        raise ConfigError(f"vocabulary {vocabulary} has no id to separate documents with; use World or a part of it")
    return found.to_spec()


def count_tokens(job: StageContext, portion: ShardPortion) -> None:
    """Leave behind how often each World token is used in the training text of a shard."""
    verdict = judge(job, portion.shard, portion.plan)
    used = np.zeros(65536, dtype=np.int64)
    for texts in _batches(portion.shard, np.flatnonzero(verdict.codes == TRAIN)):
        for ids in load_world().encode_batch_arrays(texts, threads=1):
            used += np.bincount(ids, minlength=len(used))
    save_array(job.folder("used") / f"{portion.name}.npy", used)


def most_used(job: StageContext, size: int) -> dict[str, Any]:
    """The record of World cut down to `size` ids: the end of text, the 256 bytes, and the tokens used most."""
    used = np.zeros(65536, dtype=np.int64)
    for path in sorted(job.folder("used").glob("[0-9]*.npy")):
        used += load_array(path)
    longer = 257 + np.flatnonzero(used[257:])
    kept = longer[np.lexsort((longer, -used[longer]))][: size - 257]
    return prune(world_vocabulary(), kept.tolist(), size=size).to_spec()


def tokenize_shard(job: StageContext, portion: ShardPortion) -> None:
    """Leave the tokens, lengths and counts of a shard behind."""
    shard = portion.shard
    verdict = judge(job, shard, portion.plan)
    tokenizer = _tokenizer(portion.spec)
    chosen = np.flatnonzero(verdict.codes == TRAIN)
    lengths = np.zeros(len(chosen), dtype=LENGTHS)
    lengths["times"] = verdict.times[chosen]
    with whole_folder(job.folder("tokens") / portion.name) as folder:
        done = 0
        with open(folder / "train.bin", "wb") as file:
            for texts in _batches(shard, chosen):
                for ids in tokenizer.encode_batch_arrays(texts, threads=1):
                    file.write(_with_separator(ids, tokenizer))
                    lengths["tokens"][done] = len(ids) + 1
                    done += 1
        assert done == len(chosen)
        save_array(folder / "train.npy", lengths)
        spans = _write_validation(folder / "validation.bin", portion, verdict, tokenizer)
        write_json(folder / "validation.json", spans)
        write_json(folder / "counts.json", _counts(shard, verdict, lengths, spans).rows())


def _write_validation(
    path: Path, portion: ShardPortion, verdict: MixtureAssignment, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The beginning of each document that is kept aside, and what is known of it."""
    shard = portion.shard
    aside = portion.plan.aside.get(shard.number, {})
    parts = shard.parts
    # Copies and near copies never are candidates, so the verdict on these documents is ASIDE.
    first = np.flatnonzero((verdict.codes == ASIDE) & (parts["part"] == 0))
    spans = []
    with open(path, "wb") as file, shard.open_text() as texts:
        for at in first.tolist():
            texts.seek(int(parts["start"][at]))
            document = int(parts["document"][at])
            data = texts.read(aside[document]).decode(errors="ignore").encode()
            ids = tokenizer.encode_array(data)
            file.write(_with_separator(ids, tokenizer))
            language, source = shard.kinds[parts["kind"][at]]
            spans.append({"language": language, "source": source, "bytes": len(data), "tokens": len(ids) + 1})
    return spans


def _with_separator(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> bytes:
    return np.append(ids, SEPARATOR).astype(stored_type(tokenizer.vocab_size)).tobytes()


def stored_type(vocab_size: int) -> npt.DTypeLike:
    """The dtype of tokens in the work folder."""
    return "<u2" if vocab_size <= 1 << 16 else "<i4"


_TOKENIZERS: dict[str, Tokenizer] = {}


def _tokenizer(spec: dict[str, Any]) -> Tokenizer:
    """One tokenizer a process and vocabulary."""
    key = str(sorted(spec.items()))
    if key not in _TOKENIZERS:
        _TOKENIZERS.clear()
        _TOKENIZERS[key] = tokenizer_for(spec)
    return _TOKENIZERS[key]


def _batches(shard: Shard, chosen: npt.NDArray[np.int64]) -> Iterator[list[bytes]]:
    """The texts of these parts, some at a time."""
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


def _counts(
    shard: Shard, verdict: MixtureAssignment, lengths: npt.NDArray[Any], spans: Sequence[dict[str, Any]]
) -> Counts:
    """What became of every document of a shard. A document in parts counts with its first one."""
    counts = Counts()
    parts = shard.parts
    whole = parts["part"] == 0
    for code, stage in enumerate(VERDICTS):
        if code == ASIDE:
            continue
        mine = verdict.codes == code
        for number, (language, source) in enumerate(shard.kinds):
            here = mine & (parts["kind"] == number)
            if here.any():
                size = int(parts["size"][here].sum())
                counts.add(stage, language, source, Count(int(np.count_nonzero(here & whole)), size))
    chosen = verdict.codes == TRAIN
    for number, (language, source) in enumerate(shard.kinds):
        here = parts["kind"][chosen] == number
        if here.any():
            times = lengths["times"][here].astype(np.int64)
            sizes, tokens = parts["size"][chosen][here].astype(np.int64), lengths["tokens"][here].astype(np.int64)
            total = Count(int(times.sum()), int((times * sizes).sum()), int((times * tokens).sum()))
            counts.add("stored", language, source, total)
    for span in spans:
        counts.add("validation", span["language"], span["source"], Count(1, span["bytes"], span["tokens"]))
    return counts
