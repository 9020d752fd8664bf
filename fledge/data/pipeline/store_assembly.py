"""The end of a build: the tokens of all shards become one store, with what is known of where they come from.

Nothing of it depends on when, where or by how many workers it was made. Here: the files of the store but its report.
"""

from __future__ import annotations

import json
import platform
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.files import atomic_path, hash_file, read_json, write_json
from fledge.data.binidx import BinIdxWriter, get_binidx_paths, open_binidx_writer
from fledge.data.pipeline.counts import Counts, merge_count_files
from fledge.data.pipeline.sources.inputs import InputFile
from fledge.data.pipeline.sources.reader import input_record
from fledge.data.pipeline.stage_outputs import StageContext, load_array
from fledge.data.pipeline.tokenize import LENGTHS, stored_type
from fledge.data.store import MANIFEST, TOKENIZER, VALIDATION_RECORDS, choose_dtype, compute_content_hash
from fledge.tokenizer import Vocabulary

FORMAT = "fledge token store"
VERSION = 1
PACKAGES = ("fledge", "numpy", "rensa", "py3langid", "pyarrow", "zstandard", "datasets")
Step = Callable[[int, int], None]


def assemble(job: StageContext, to: Path, spec: dict[str, Any], step: Step) -> dict[str, Any]:
    """Write all files of tokens. Returns the manifest's part about them."""
    folders = job.pieces("tokens")
    vocab_size = Vocabulary.from_spec(spec).size
    dtype, stored = choose_dtype(job.config.dtype, vocab_size), np.dtype(stored_type(vocab_size))
    made: dict[str, BinIdxWriter] = {}
    with open_binidx_writer(to / "train", dtype) as train:
        epoch, more = 0, True
        while more:
            more = False
            for number, folder in enumerate(folders):
                step(number, len(folders))
                more |= _copy_epoch(folder, epoch, stored, train)
            epoch += 1
        made["train"] = train
    with open_binidx_writer(to / "validation", dtype) as validation, atomic_path(to / VALIDATION_RECORDS) as temporary:
        with open(temporary, "w", encoding="utf-8") as lines:
            for folder in folders:
                spans = read_json(folder / "validation.json")
                sizes = np.array([span["tokens"] for span in spans], dtype=np.int64)
                validation.add_many(np.fromfile(folder / "validation.bin", dtype=stored), sizes)
                lines.writelines(json.dumps(span) + "\n" for span in spans)
        made["validation"] = validation
    with atomic_path(to / TOKENIZER) as temporary:
        temporary.write_text(json.dumps(spec) + "\n", encoding="utf-8")
    hashes = {part: writer.sha256 for part, writer in made.items()}
    return {
        "sha256": compute_content_hash(hashes, spec),
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "tokens": {part: writer.tokens for part, writer in made.items()},
        "documents": {part: writer.documents for part, writer in made.items()},
        "outputs": dict(_outputs(to, hashes)),
    }


def _copy_epoch(folder: Path, epoch: int, stored: np.dtype[Any], writer: BinIdxWriter) -> bool:
    """Write what a shard's documents with more than `epoch` times have. Returns whether any has more times left."""
    lengths = load_array(folder / "train.npy")
    assert lengths.dtype == LENGTHS
    wanted = lengths["times"] > epoch
    if not wanted.any():
        return False
    ids: npt.NDArray[Any] = np.fromfile(folder / "train.bin", dtype=stored)
    if not wanted.all():
        ids = ids[np.repeat(wanted, lengths["tokens"])]
    writer.add_many(ids, lengths["tokens"][wanted])
    return bool((lengths["times"] > epoch + 1).any())


def _outputs(to: Path, hashes: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for part, digest in hashes.items():
        tokens, index = get_binidx_paths(to / part)
        yield tokens.name, {"bytes": tokens.stat().st_size, "sha256": digest}
        yield index.name, {"bytes": index.stat().st_size, "sha256": hash_file(index)}
    for name in (VALIDATION_RECORDS, TOKENIZER):
        yield name, {"bytes": (to / name).stat().st_size, "sha256": hash_file(to / name)}


def manifest(job: StageContext, inputs: list[InputFile], fingerprint: str, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that is known of a store."""
    counts = merge_count_files(piece / "counts.json" for stage in ("read", "tokens") for piece in job.pieces(stage))
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "fingerprint": fingerprint,
        "seed": job.config.seed,
        "counts": {
            "columns": ["stage", "language", "source", "documents", "bytes", "tokens"],
            "rows": counts.rows(),
        },
        "inputs": [
            {"name": file.name, "format": file.format, "bytes": file.size, "sha256": _input_hash(job, file)}
            for file in inputs
        ],
        "config": asdict(job.config),
        "versions": dict(_versions()),
    }


def read_counts(manifest: dict[str, Any]) -> Counts:
    """The counts in a manifest."""
    counts = Counts()
    counts.merge(manifest["counts"]["rows"])
    return counts


def write_manifest(to: Path, manifest: dict[str, Any]) -> None:
    """The last file of a store: with it the store is finished."""
    write_json(to / MANIFEST, manifest)


def _input_hash(job: StageContext, file: InputFile) -> str | None:
    return None if file.format == "hub" else read_json(input_record(job, file))


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "unicode", unicodedata.unidata_version
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
