"""Find the input files of a build, and divide them into slices, the tasks of the read stage.

A slice is a range of a plain JSONL file, some row groups of a Parquet file, some text files, one compressed file, or
one shard of a hub data set. Slices depend only on the config and the files, so their numbers define a fixed order of
all documents.
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

FORMAT_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """A file or a hub data set that a build reads."""

    name: str  # as in the manifest: relative to the folder of the config
    path: str
    format: str
    source_index: int  # index into the sources of the config
    size: int  # bytes; 0 for a hub data set
    mtime_ns: int  # 0 for a hub data set


@dataclass(frozen=True)
class InputSlice:
    """The input of one task: several text files, or the range from `start` to `end` of one other input."""

    number: int
    inputs: tuple[InputFile, ...]
    start: int = 0  # bytes, row groups, or the number of a hub shard
    end: int = 0  # bytes, row groups, or the number of hub shards

    @property
    def name(self) -> str:
        """The name of its output folder."""
        return f"{self.number:09}"


def find_inputs(
    config: BuildConfig, base: Path, exclude: Path | None = None
) -> tuple[list[InputFile], list[InputSlice]]:
    """All inputs, and all slices in order. Raises UsageError for a source without files.

    base: the folder of the config. exclude: a folder whose files are not inputs, such as the folder of the store, which
    a pattern may match.
    """
    inputs: list[InputFile] = []
    slices: list[InputSlice] = []
    for index, source in enumerate(config.sources):
        if source.hub:
            count = hub.count_shards(source)
            files = [InputFile(source.label, source.hub, "hub", index, 0, 0)]
            ranges: Iterator[tuple[tuple[InputFile, ...], int, int]] = (((files[0],), n, count) for n in range(count))
        else:
            files = [_make_input(path, source, index, base) for path in _find_files(source, base, exclude)]
            ranges = _divide(files, config.piece_bytes)
        inputs += files
        slices += [InputSlice(number, *part) for number, part in enumerate(ranges, len(slices))]
    return inputs, slices


def get_default_source(source: SourceConfig, file: InputFile) -> str:
    """The source of a document without one."""
    if source.name or source.hub:
        return source.name or source.hub
    path = Path(file.path)
    if file.format == "text" and (glob.has_magic(source.path) or path.name != Path(source.path).name):
        folder = Path(source.path.split("*")[0])  # "src" for "src/**/*.py"
        return folder.name or path.parent.name
    return get_plain_stem(path)


def _find_files(source: SourceConfig, base: Path, exclude: Path | None) -> list[Path]:
    root = base / source.path
    if glob.has_magic(source.path):
        paths = [Path(name) for name in glob.glob(os.path.join(glob.escape(str(base)), source.path), recursive=True)]
    elif root.is_dir():
        paths = [path for path in root.rglob("*") if not _is_hidden(path.relative_to(root))]
    else:
        paths = [root]
    files = sorted(path for path in paths if path.is_file() and not (exclude and _is_inside(path, exclude)))
    if not files:
        raise UsageError(f"source {source.path}: {_explain_missing(source, base, paths)}")
    return files


def _explain_missing(source: SourceConfig, base: Path, paths: list[Path]) -> str:
    """The reason why a source has no files. paths: all paths that match it."""
    if (base / source.path).is_dir():
        return f"the folder {base / source.path} contains no files to read"
    if folders := [path for path in paths if path.is_dir()]:
        name = os.path.relpath(folders[0], base)
        return f"it matches only folders, such as {name}; name the folder itself, or end the pattern with /**/*"
    if any(path.is_file() for path in paths):
        return "it matches only files of the token store that this build writes; name other files"
    return f"there is no such file in {base}; paths are relative to the folder of the config file"


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is inside a folder. The path may contain ".."."""
    return Path(os.path.normpath(path)).is_relative_to(folder)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _make_input(path: Path, source: SourceConfig, source_index: int, base: Path) -> InputFile:
    status = path.stat()
    file_format = source.format or FORMAT_BY_SUFFIX.get(get_plain_suffix(path), "text")
    if file_format == "parquet" and is_compressed(path):
        raise UsageError(f"{path}: Parquet files use internal compression; decompress this file first")
    name = Path(os.path.relpath(path, base)).as_posix()
    return InputFile(name, str(path), file_format, source_index, status.st_size, status.st_mtime_ns)


def _divide(files: list[InputFile], slice_bytes: int) -> Iterator[tuple[tuple[InputFile, ...], int, int]]:
    """(inputs, start, end) of each slice."""
    texts: list[InputFile] = []
    total = 0
    for file in files:
        if texts and (file.format != "text" or total + file.size > slice_bytes):
            yield tuple(texts), 0, 0
            texts, total = [], 0
        if file.format == "text":
            texts.append(file)
            total += file.size
        elif file.format == "parquet":
            for start, end in _divide_row_groups(file, slice_bytes):
                yield (file,), start, end
        elif is_compressed(Path(file.path)):
            yield (file,), 0, 0
        else:
            for start in range(0, file.size, slice_bytes):
                yield (file,), start, min(start + slice_bytes, file.size)
    if texts:
        yield tuple(texts), 0, 0


def _divide_row_groups(file: InputFile, slice_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the row groups of each slice."""
    with open_parquet(file.path) as parquet:
        sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
    start = total = 0
    for group, size in enumerate(sizes):
        if group > start and total + size > slice_bytes:
            yield start, group
            start, total = group, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def open_parquet(path: str) -> Any:
    """Open a Parquet file as a context manager. Raises UsageError without pyarrow, DataError for a damaged file."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f'{path}: Parquet files need the package pyarrow; pip install "fledge[data]"') from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
