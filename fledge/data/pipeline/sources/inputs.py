"""What a build reads: the files of a config, and the slices in which workers take them.

A slice is a range of a plain JSONL file, some row groups of a Parquet file, some text files, one compressed file, or
one shard of a hub data set. Slices depend on the config and the files alone, so their numbers are a fixed order of all
documents. Here: finding files and cutting them. Not here: reading a slice (reading.py).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import DataError, UsageError
from fledge.data.compression import get_plain_stem, get_plain_suffix, is_compressed
from fledge.data.pipeline.config import BuildConfig, SourceConfig
from fledge.data.pipeline.sources import hub

BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """A file, or a hub data set, that a build reads."""

    name: str  # as in the manifest: from where the config is
    path: str
    format: str
    source: int  # which of the config's
    size: int
    changed: int  # mtime in ns; 0 of a hub data set


@dataclass(frozen=True)
class InputSlice:
    """What one worker reads at a time. Of text, all of `inputs`; of anything else, `start` to `end` of the only one."""

    number: int
    inputs: tuple[InputFile, ...]
    start: int = 0  # bytes, row groups, or the number of a shard
    end: int = 0

    @property
    def name(self) -> str:
        """Of the folder with what was read."""
        return f"{self.number:09}"


def survey(config: BuildConfig, base: Path, without: Path | None = None) -> tuple[list[InputFile], list[InputSlice]]:
    """All inputs, and all slices in order. Raises UsageError for a source without a file.

    without: a folder whose files are none: the store itself may lie where a pattern finds it.
    """
    inputs: list[InputFile] = []
    slices: list[InputSlice] = []
    for at, source in enumerate(config.sources):
        if source.hub:
            shards = hub.shards(source)
            found = [InputFile(source.label, source.hub, "hub", at, 0, 0)]
            parts: Iterator[tuple[tuple[InputFile, ...], int, int]] = (((found[0],), n, shards) for n in range(shards))
        else:
            found = [_input(path, source, at, base) for path in _files(source, base, without)]
            parts = _cut(found, config.piece_bytes)
        inputs += found
        slices += [InputSlice(number, *part) for number, part in enumerate(parts, len(slices))]
    return inputs, slices


def default_source(source: SourceConfig, file: InputFile) -> str:
    """The source of a document that names none."""
    if source.name or source.hub:
        return source.name or source.hub
    path = Path(file.path)
    if file.format == "text" and (glob.has_magic(source.path) or path.name != Path(source.path).name):
        folder = Path(source.path.split("*")[0])  # "src" of "src/**/*.py"
        return folder.name or path.parent.name
    return get_plain_stem(path)


def _files(source: SourceConfig, base: Path, without: Path | None) -> list[Path]:
    place = base / source.path
    if glob.has_magic(source.path):
        paths = [Path(name) for name in glob.glob(os.path.join(glob.escape(str(base)), source.path), recursive=True)]
    elif place.is_dir():
        paths = [path for path in place.rglob("*") if not any(part.startswith(".") for part in _below(path, place))]
    else:
        paths = [place]
    files = sorted(path for path in paths if path.is_file() and not (without and _lies_in(path, without)))
    if not files:
        raise UsageError(f"source {source.path}: {_absent(source, base, paths)}")
    return files


def _absent(source: SourceConfig, base: Path, paths: list[Path]) -> str:
    """Why a source has no file."""
    if (base / source.path).is_dir():
        return f"the folder {base / source.path} has no file in it that could be read"
    if folders := [path for path in paths if path.is_dir()]:
        name = os.path.relpath(folders[0], base)
        return f"only folders fit it, {name} for one; name the folder itself, or end the pattern with /**/*"
    if any(path.is_file() for path in paths):
        return "only files of the token store fit it, into which this build writes"
    return f"there is no such file in {base}; paths start where the config file is"


def _lies_in(path: Path, folder: Path) -> bool:
    """Also where the path goes through "..", which only the names without it show."""
    return Path(os.path.normpath(path)).is_relative_to(folder)


def _below(path: Path, folder: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts


def _input(path: Path, source: SourceConfig, at: int, base: Path) -> InputFile:
    status = path.stat()
    kind = source.format or BY_SUFFIX.get(get_plain_suffix(path), "text")
    if kind == "parquet" and is_compressed(path):
        raise UsageError(f"{path}: Parquet files are compressed inside; unpack this one first")
    name = Path(os.path.relpath(path, base)).as_posix()
    return InputFile(name, str(path), kind, at, status.st_size, status.st_mtime_ns)


def _cut(files: list[InputFile], size: int) -> Iterator[tuple[tuple[InputFile, ...], int, int]]:
    """(inputs, start, end) of each slice."""
    texts: list[InputFile] = []
    total = 0
    for file in files:
        if texts and (file.format != "text" or total + file.size > size):
            yield tuple(texts), 0, 0
            texts, total = [], 0
        if file.format == "text":
            texts.append(file)
            total += file.size
        elif file.format == "parquet":
            for start, end in _row_groups(file, size):
                yield (file,), start, end
        elif is_compressed(Path(file.path)):
            yield (file,), 0, 0
        else:
            for start in range(0, file.size, size):
                yield (file,), start, min(start + size, file.size)
    if texts:
        yield tuple(texts), 0, 0


def _row_groups(file: InputFile, size: int) -> Iterator[tuple[int, int]]:
    with open_parquet(file.path) as opened:
        sizes = [opened.metadata.row_group(at).total_byte_size for at in range(opened.num_row_groups)]
    start = total = 0
    for at, one in enumerate(sizes):
        if at > start and total + one > size:
            yield start, at
            start, total = at, 0
        total += one
    if start < len(sizes):
        yield start, len(sizes)


def open_parquet(path: str) -> Any:
    """A Parquet file, for `with`. Raises UsageError without pyarrow, DataError for a damaged file."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f'{path}: Parquet files need the package pyarrow; pip install "fledge[data]"') from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from None
