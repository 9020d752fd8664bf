"""How fast tokenizers are: the native one and its Python twin, beside the programs of others that are installed.

All work on the same documents, one call each, by turns in one process. Each measurement gets texts that no program has
seen: Python keeps the UTF-8 form of a str once a program has asked for it in a certain way, which would make that
program's second measurement cheaper than any first. The programs written in Python get a part of the documents.
Where two programs do not give the same ids, no figure is given.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fledge.bench.environment import machine_facts, package_version
from fledge.bench.harness import Report, Sample, interleaved
from fledge.bench.texts import size_of, synthetic, thinned
from fledge.core.device import count_usable_cores
from fledge.core.errors import FledgeError, UsageError
from fledge.data.texts import read_texts
from fledge.tokenizer import Tokenizer, load_world
from fledge.tokenizer.native_tokenizer import is_available

MEGABYTE = 1_000_000
SLOW_SHARE = 16
"""Programs in Python get a sixteenth of the bytes: they are some fifty times slower."""

FASTEST_PEER = "pyrwkv-tokenizer"
Run = Callable[[Sequence[str]], Sequence[Any]]


@dataclass(frozen=True)
class Spec:
    """What to measure."""

    text: Path | None = None  # a file or folder; None: a made-up text
    megabytes: float = 16.0  # of it at most
    repeats: int = 5
    threads: int | None = None  # up to so many; None: every core

    def __post_init__(self) -> None:
        for name, least in (("megabytes", 0.01), ("repeats", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Program:
    """One way to encode documents. `run` gives the ids of each, or their number where it `counts` only."""

    name: str
    run: Run
    slow: bool = False
    counts: bool = False


@dataclass(frozen=True)
class Outcome:
    """All figures of one benchmark, in bytes of UTF-8 a second."""

    spec: Spec
    machine: dict[str, Any]
    text: dict[str, Any]
    figures: dict[str, Sample]

    def ratio(self) -> float | None:
        """How many times as fast as the fastest peer one call a document is, lists of ids both."""
        ours, theirs = self.figures.get("fledge native"), self.figures.get(FASTEST_PEER)
        return ours.median / theirs.median if ours and theirs else None

    def record(self, command: str) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "benchmark": "tokenizer",
            "command": command,
            "machine": self.machine,
            "peers": {name: package_version(name) for name in (FASTEST_PEER, "rwkv")},
            "settings": {**asdict(self.spec), "text": self.text["source"]},
            "text": self.text,
            "figures": {name: {"bytes_per_s": sample.summary()} for name, sample in self.figures.items()},
            "ratio_to_the_fastest_peer": self.ratio(),
        }


def run(spec: Spec, report: Report) -> Outcome:
    """Check that all programs give the same ids, then measure. Raises FledgeError where they do not."""
    limit = int(spec.megabytes * MEGABYTE)
    given = synthetic(limit) if spec.text is None else (document.text for document in read_texts(spec.text))
    texts = thinned(given, limit)
    part = thinned(texts, size_of(texts) // SLOW_SHARE)
    programs = {program.name: program for program in find_programs(spec.threads or count_usable_cores())}
    if all(program.slow for program in programs.values()):
        texts = part
    tokens = _check(programs, texts, part, report)
    rates: dict[str, list[float]] = {name: [] for name in programs}
    order = interleaved(tuple(programs), spec.repeats)
    for done, (_, name) in enumerate(order):
        report(name, done, len(order))
        program = programs[name]
        rates[name].append(_rate(program.run, part if program.slow else texts))
    about = {
        "source": "synthetic" if spec.text is None else spec.text.name,
        "documents": len(texts),
        "bytes": size_of(texts),
        "tokens": tokens,
    }
    return Outcome(spec, machine_facts(), about, {name: Sample(tuple(values)) for name, values in rates.items()})


def find_programs(threads: int) -> Iterator[Program]:
    """Those that are here: Fledge's, then the packages of others."""
    if is_available():
        yield from _native_programs(load_world("native"), threads)
    if importlib.util.find_spec("pyrwkv_tokenizer"):
        peer = importlib.import_module("pyrwkv_tokenizer").RWKVTokenizer()
        yield Program(FASTEST_PEER, _one_by_one(peer.encode))
        yield Program(f"{FASTEST_PEER}, batch, its own threads", lambda texts: peer.encode_batch(list(texts)))
    yield Program("fledge python", _one_by_one(load_world("python").encode), slow=True)
    if importlib.util.find_spec("rwkv"):
        module = importlib.import_module("rwkv.rwkv_tokenizer")
        vocabulary = Path(str(module.__file__)).parent / "rwkv_vocab_v20230424.txt"
        yield Program("rwkv", _one_by_one(module.TRIE_TOKENIZER(str(vocabulary)).encode), slow=True)


def _native_programs(tokenizer: Tokenizer, threads: int) -> Iterator[Program]:
    yield Program("fledge native", _one_by_one(tokenizer.encode))
    yield Program("fledge native, arrays", _one_by_one(tokenizer.encode_array))
    yield Program("fledge native, count", _one_by_one(tokenizer.count), counts=True)
    numbers = sorted({*(2**power for power in range(threads.bit_length())), threads})
    for number in numbers:
        yield Program(f"fledge native, batch, {_threads(number)}", _batch(tokenizer.encode_batch, number))
    for number in numbers:
        name = f"fledge native, batch of arrays, {_threads(number)}"
        yield Program(name, _batch(tokenizer.encode_batch_arrays, number))


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _one_by_one(encode: Callable[[str], Any]) -> Run:
    return lambda texts: [encode(text) for text in texts]


def _batch(encode: Callable[[Sequence[str], int], Sequence[Any]], threads: int) -> Run:
    return lambda texts: encode(texts, threads)


def _check(programs: dict[str, Program], texts: list[str], part: list[str], report: Report) -> int:
    """Compare the ids of all programs, which also warms them up. Returns how many there are."""
    report("comparing ids", 0, 1)
    reference = next(iter(programs.values()))
    whole, little = reference.run(texts), reference.run(part)
    for program in programs.values():
        given, expected = (part, little) if program.slow else (texts, whole)
        for at, (ours, theirs) in enumerate(zip(expected, program.run(given), strict=True)):
            if (len(ours) != theirs) if program.counts else (list(ours) != list(theirs)):
                raise FledgeError(
                    f"{program.name} and {reference.name} cut document {at} differently: {given[at]!r:.60}"
                )
    return sum(map(len, whole))


def _rate(encode: Run, texts: Sequence[str]) -> float:
    """Bytes of UTF-8 a second. Collecting garbage and freeing the ids of the last measurement is not part of it."""
    size = size_of(texts)
    unseen = [text.encode().decode() for text in texts]
    gc.collect()
    began = time.perf_counter()
    ids = encode(unseen)
    seconds = time.perf_counter() - began
    del ids
    return size / seconds
