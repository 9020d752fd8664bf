"""The speed of the native tokenizer and its Python reference implementation, with installed packages as baselines.

All programs encode the same documents in one process, in turn. Every measurement encodes new str objects. Python caches
the UTF-8 form of a str once a program has requested it in a certain way, which would speed up later measurements of
that program. The programs written in Python encode a part of the documents. If two programs return different ids, no
metrics are reported.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fledge.bench.measurement import summarize
from fledge.bench.sample_texts import count_bytes, sample_documents, synthetic_documents
from fledge.bench.suite import Benchmark, Suite
from fledge.core.device import count_usable_cores
from fledge.core.errors import FledgeError
from fledge.core.machine import package_version
from fledge.data.texts import read_texts
from fledge.tokenizer import Tokenizer, load_world
from fledge.tokenizer.native_tokenizer import is_available

MEGABYTE = 1_000_000
SLOW_SHARE = 16
"""Programs in Python encode a sixteenth of the bytes: they are about fifty times slower."""

FASTEST_BASELINE = "pyrwkv-tokenizer"
EncodeAll = Callable[[Sequence[str]], Sequence[Any]]


@dataclass(frozen=True)
class TokenizerProgram:
    """One way to encode documents. `encode` returns the ids of each, or their number if it only `counts`."""

    name: str
    encode: EncodeAll
    slow: bool = False
    counts: bool = False


@dataclass(frozen=True)
class TokenizerBenchmark(Benchmark):
    """Settings of the tokenizer benchmark."""

    kind: ClassVar[str] = "tokenizer"

    text: Path | None = None  # a file or folder; None: synthetic text
    megabytes: float = 16.0  # of the text, at most
    repeats: int = 5
    threads: int | None = None  # at most; None: all cores

    def __post_init__(self) -> None:
        self.require_at_least(0.01, "megabytes")
        self.require_at_least(1, "repeats", "threads")

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the name of the text only."""
        return {**super().settings(), "text": "synthetic" if self.text is None else self.text.name}

    def measure(self, suite: Suite) -> None:
        """Check that all programs return the same ids, then measure bytes of UTF-8 per second.

        Raises FledgeError if the ids differ.
        """
        limit = int(self.megabytes * MEGABYTE)
        documents = (document.text for document in read_texts(self.text)) if self.text else synthetic_documents(limit)
        texts = sample_documents(documents, limit)
        part = sample_documents(texts, count_bytes(texts) // SLOW_SHARE)
        programs = {program.name: program for program in find_programs(self.threads or count_usable_cores())}
        if all(program.slow for program in programs.values()):
            texts = part
        suite.report("comparing ids")
        tokens = count_same_ids(programs, texts, part)
        suite.total_runs = len(programs) * self.repeats
        calls = {
            name: partial(encoding_rate, program.encode, part if program.slow else texts)
            for name, program in programs.items()
        }
        rates = {name: summarize(run.results) for name, run in suite.interleave(calls, self.repeats).items()}
        ours, baseline = rates.get("fledge native"), rates.get(FASTEST_BASELINE)
        source = suite.record["settings"]["text"]
        suite.record |= {
            "peers": {name: package_version(name) for name in (FASTEST_BASELINE, "rwkv")},
            "text": {"source": source, "documents": len(texts), "bytes": count_bytes(texts), "tokens": tokens},
            "figures": {name: {"bytes_per_s": rate} for name, rate in rates.items()},
            # one call per document, lists of ids
            "ratio_to_the_fastest_peer": ours["median"] / baseline["median"] if ours and baseline else None,
        }


def find_programs(threads: int) -> Iterator[TokenizerProgram]:
    """Yield the available programs: those of Fledge and the installed packages."""
    if is_available():
        yield from _native_programs(load_world("native"), threads)
    if importlib.util.find_spec("pyrwkv_tokenizer"):
        tokenizer = importlib.import_module("pyrwkv_tokenizer").RWKVTokenizer()
        yield TokenizerProgram(FASTEST_BASELINE, _one_by_one(tokenizer.encode))
        batch = f"{FASTEST_BASELINE}, batch, its own threads"
        yield TokenizerProgram(batch, lambda texts: tokenizer.encode_batch(list(texts)))
    yield TokenizerProgram("fledge python", _one_by_one(load_world("python").encode), slow=True)
    if importlib.util.find_spec("rwkv"):
        module = importlib.import_module("rwkv.rwkv_tokenizer")
        vocabulary = Path(str(module.__file__)).parent / "rwkv_vocab_v20230424.txt"
        yield TokenizerProgram("rwkv", _one_by_one(module.TRIE_TOKENIZER(str(vocabulary)).encode), slow=True)


def _native_programs(tokenizer: Tokenizer, threads: int) -> Iterator[TokenizerProgram]:
    yield TokenizerProgram("fledge native", _one_by_one(tokenizer.encode))
    yield TokenizerProgram("fledge native, arrays", _one_by_one(tokenizer.encode_array))
    yield TokenizerProgram("fledge native, count", _one_by_one(tokenizer.count), counts=True)
    counts = sorted({*(2**power for power in range(threads.bit_length())), threads})
    for kind, encode in (("batch", tokenizer.encode_batch), ("batch of arrays", tokenizer.encode_batch_arrays)):
        for count in counts:
            name = f"fledge native, {kind}, {count} thread{'s' if count > 1 else ''}"
            yield TokenizerProgram(name, _batch(encode, count))


def _one_by_one(encode: Callable[[str], Any]) -> EncodeAll:
    return lambda texts: [encode(text) for text in texts]


def _batch(encode: Callable[[Sequence[str], int], Sequence[Any]], threads: int) -> EncodeAll:
    return lambda texts: encode(texts, threads)


def count_same_ids(programs: dict[str, TokenizerProgram], texts: list[str], part: list[str]) -> int:
    """Compare the ids of all programs, which also warms them up, and return their number.

    Raises FledgeError if they differ.
    """
    reference = next(iter(programs.values()))
    ids, ids_of_part = reference.encode(texts), reference.encode(part)
    for program in programs.values():
        documents, expected = (part, ids_of_part) if program.slow else (texts, ids)
        for index, (ours, theirs) in enumerate(zip(expected, program.encode(documents), strict=True)):
            if (len(ours) != theirs) if program.counts else (list(ours) != list(theirs)):
                raise FledgeError(
                    f"{program.name} and {reference.name} encode document {index} differently: {documents[index]!r:.60}"
                )
    return sum(map(len, ids))


def encoding_rate(encode: EncodeAll, texts: Sequence[str]) -> float:
    """Return bytes of UTF-8 per second, without garbage collection and without freeing the ids."""
    size = count_bytes(texts)
    new_texts = [text.encode().decode() for text in texts]
    gc.collect()
    started = time.perf_counter()
    ids = encode(new_texts)
    seconds = time.perf_counter() - started
    del ids
    return size / seconds
