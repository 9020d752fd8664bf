"""The last stage of a build: assemble the tokens of all shards into a store, and write its manifest.

The files do not depend on the time, the machine or the number of workers.
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
from fledge.data.pipeline.sources.reader import get_input_hash_path
from fledge.data.pipeline.stage_outputs import StageContext, load_array
from fledge.data.pipeline.tokenize import LENGTHS_DTYPE, choose_work_dtype
from fledge.data.store import MANIFEST, TOKENIZER, VALIDATION_RECORDS, choose_dtype, compute_content_hash
from fledge.tokenizer import Vocabulary

FORMAT = "fledge token store"
VERSION = 1
PACKAGES = ("fledge", "numpy", "rensa", "py3langid", "pyarrow", "zstandard", "datasets")
Progress = Callable[[int, int], None]


def assemble_store(context: StageContext, to: Path, spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the token files, validation records and vocabulary of a store. Returns their part of the manifest."""
    folders = context.list_outputs("tokens")
    vocab_size = Vocabulary.from_spec(spec).size
    dtype, work_dtype = choose_dtype(context.config.dtype, vocab_size), np.dtype(choose_work_dtype(vocab_size))
    writers: dict[str, BinIdxWriter] = {}
    with open_binidx_writer(to / "train", dtype) as train:
        epoch, has_more = 0, True
        while has_more:
            has_more = False
            for number, folder in enumerate(folders):
                progress(number, len(folders))
                has_more |= _copy_epoch(folder, epoch, work_dtype, train)
            epoch += 1
        writers["train"] = train
    with open_binidx_writer(to / "validation", dtype) as validation, atomic_path(to / VALIDATION_RECORDS) as temporary:
        with open(temporary, "w", encoding="utf-8") as lines:
            for folder in folders:
                records = read_json(folder / "validation.json")
                sizes = np.array([record["tokens"] for record in records], dtype=np.int64)
                validation.add_many(np.fromfile(folder / "validation.bin", dtype=work_dtype), sizes)
                lines.writelines(json.dumps(record) + "\n" for record in records)
        writers["validation"] = validation
    with atomic_path(to / TOKENIZER) as temporary:
        temporary.write_text(json.dumps(spec) + "\n", encoding="utf-8")
    hashes = {part: writer.sha256 for part, writer in writers.items()}
    return {
        "sha256": compute_content_hash(hashes, spec),
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "tokens": {part: writer.tokens for part, writer in writers.items()},
        "documents": {part: writer.documents for part, writer in writers.items()},
        "outputs": dict(_describe_outputs(to, hashes)),
    }


def _copy_epoch(folder: Path, epoch: int, work_dtype: np.dtype[Any], writer: BinIdxWriter) -> bool:
    """Append the documents of a shard that are used more than `epoch` times.

    Returns whether any of them is used again in a later epoch.
    """
    lengths = load_array(folder / "train.npy")
    assert lengths.dtype == LENGTHS_DTYPE
    is_used = lengths["times"] > epoch
    if not is_used.any():
        return False
    ids: npt.NDArray[Any] = np.fromfile(folder / "train.bin", dtype=work_dtype)
    if not is_used.all():
        ids = ids[np.repeat(is_used, lengths["tokens"])]
    writer.add_many(ids, lengths["tokens"][is_used])
    return bool((lengths["times"] > epoch + 1).any())


def _describe_outputs(to: Path, hashes: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for part, digest in hashes.items():
        tokens, index = get_binidx_paths(to / part)
        yield tokens.name, {"bytes": tokens.stat().st_size, "sha256": digest}
        yield index.name, {"bytes": index.stat().st_size, "sha256": hash_file(index)}
    for name in (VALIDATION_RECORDS, TOKENIZER):
        yield name, {"bytes": (to / name).stat().st_size, "sha256": hash_file(to / name)}


def build_manifest(
    context: StageContext, inputs: list[InputFile], fingerprint: str, contents: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a store. contents: the result of `assemble_store`."""
    outputs = [output for stage in ("read", "tokens") for output in context.list_outputs(stage)]
    counts = merge_count_files(output / "counts.json" for output in outputs)
    return {
        "format": FORMAT,
        "version": VERSION,
        **contents,
        "fingerprint": fingerprint,
        "seed": context.config.seed,
        "counts": {
            "columns": ["stage", "language", "source", "documents", "bytes", "tokens"],
            "rows": counts.rows(),
        },
        "inputs": [
            {"name": file.name, "format": file.format, "bytes": file.size, "sha256": _read_input_hash(context, file)}
            for file in inputs
        ],
        "config": asdict(context.config),
        "versions": dict(_list_versions()),
    }


def read_counts(manifest: dict[str, Any]) -> Counts:
    """The counts of a manifest."""
    counts = Counts()
    counts.merge(manifest["counts"]["rows"])
    return counts


def write_manifest(to: Path, manifest: dict[str, Any]) -> None:
    """Write the last file of a store. A store with a manifest is finished."""
    write_json(to / MANIFEST, manifest)


def _read_input_hash(context: StageContext, file: InputFile) -> str | None:
    return None if file.format == "hub" else read_json(get_input_hash_path(context, file))


def _list_versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "unicode", unicodedata.unidata_version
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
