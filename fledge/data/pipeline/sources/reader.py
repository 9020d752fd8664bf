"""The read stage: read a slice, identify languages, clean the documents, and write them as shards with their hashes.

Also the stage that hashes the input files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from fledge.core.errors import DataError, UsageError
from fledge.core.files import hash_file, write_json
from fledge.data.compression import CompressionError, is_compressed, open_decompressed
from fledge.data.documents import Document, OnInvalid, RecordFields, make_line_error, parse_lines, strip_region
from fledge.data.pipeline.clean import CleaningStep, make_steps
from fledge.data.pipeline.config import BuildConfig
from fledge.data.pipeline.counts import Count, Counts
from fledge.data.pipeline.dedup.minhash import MinHasher
from fledge.data.pipeline.language import LanguageIdentifier
from fledge.data.pipeline.shards import ShardWriter
from fledge.data.pipeline.sources import hub
from fledge.data.pipeline.sources.inputs import InputFile, InputSlice, get_default_source, open_parquet
from fledge.data.pipeline.stage_outputs import StageContext, atomic_folder
from fledge.data.texts import read_plain_text

PARQUET_BATCH_ROWS = 256
SKIP_ADVICE = '; correct or remove it, or set on_error = "skip" to omit such lines'


def hash_input(context: StageContext, file: InputFile) -> None:
    """Stage function: write the SHA-256 of an input file."""
    try:
        digest = hash_file(file.path)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}") from None
    write_json(get_input_hash_path(context, file), digest)


def get_input_hash_path(context: StageContext, file: InputFile) -> Path:
    """The file to which `hash_input` writes the hash."""
    key = hashlib.sha256(f"{file.source_index} {file.name}".encode()).hexdigest()[:24]
    return context.folder("inputs") / f"{key}.json"


def read_slice(context: StageContext, input_slice: InputSlice) -> None:
    """Stage function: write the shards and counts of a slice."""
    config = context.config
    counts = Counts()
    cleaning_steps = make_steps(config.clean)
    get_identifier = cache(lambda: LanguageIdentifier(config.languages.characters))  # many sources need none
    minhasher = MinHasher(config.dedup) if config.dedup.near else None

    def skip(_number: int, _error: Exception) -> None:
        file = input_slice.inputs[0]
        counts.add("bad", "", get_default_source(config.sources[file.source_index], file), Count(1))

    with (
        atomic_folder(context.folder("read") / input_slice.name) as folder,
        ShardWriter(folder, minhasher, config.cut_characters) as writer,
    ):
        for document in read_documents(config, input_slice, skip if config.on_error == "skip" else None):
            language = document.language
            if not language and config.languages.identify:
                language = get_identifier()(document.text)
            count = Count(1, len(document.text.encode()))
            counts.add("read", language, document.source, count)
            text, reason = clean_text(document.text, cleaning_steps)
            if text:
                counts.add("clean", language, document.source, Count(1, len(text.encode())))
                writer.add(text, language, document.source)
            else:
                counts.add(f"dropped: {reason}", language, document.source, count)
        write_json(folder / "counts.json", counts.rows())


def clean_text(text: str, cleaning_steps: Sequence[CleaningStep]) -> tuple[str, str]:
    """The text after all steps, and the reason if it is empty: the step that dropped it, or "empty"."""
    for step in cleaning_steps:
        result = step.run(text) if text else ""
        if result is None:
            return "", step.name
        text = result
    return text, "empty"


def read_documents(config: BuildConfig, input_slice: InputSlice, skip: OnInvalid | None) -> Iterator[Document]:
    """The documents of a slice. skip: called for an invalid record; None raises UsageError with its location."""
    file = input_slice.inputs[0]
    source = config.sources[file.source_index]
    fields = RecordFields(
        text=source.text,
        template=source.template,
        language_field=source.language_field,
        source_field=source.source_field,
        language=source.language,
        source=get_default_source(source, file),
    )
    try:
        if file.format == "jsonl":
            yield from _read_json_lines(input_slice, fields, skip)
        elif file.format == "parquet":
            yield from _read_parquet(input_slice, fields, skip)
        elif file.format == "hub":
            for number, record in enumerate(hub.read_records(source, input_slice.start, input_slice.end), 1):
                yield from _convert(f"{source.hub}, shard {input_slice.start}, record", number, record, fields, skip)
        else:
            yield from _read_text_files(input_slice, fields, skip)
    except CompressionError as error:
        names = ", ".join(input_file.path for input_file in input_slice.inputs[:3])
        raise DataError(f"{names}: cannot be read completely: {error}") from None


def _read_json_lines(input_slice: InputSlice, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    path = Path(input_slice.inputs[0].path)

    def fail(number: int, error: Exception) -> None:
        before = 0 if not input_slice.start else _count_lines_before(path, input_slice.start)
        raise UsageError(f"{make_line_error(path, before + number, error)}{SKIP_ADVICE}")

    with open_decompressed(path) as file:
        lines: Iterable[bytes] = file
        if not is_compressed(path):
            lines = _read_lines_between(file, input_slice.start, input_slice.end)
        yield from parse_lines(lines, fields, skip or fail)


def _read_lines_between(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The lines that begin at byte `start` or later, and before byte `end`."""
    position = start
    if start:
        file.seek(start - 1)
        position = start - 1 + len(file.readline())
    while position < end and (line := file.readline()):
        yield line
        position += len(line)


def _count_lines_before(path: Path, end: int) -> int:
    """The number of lines that begin before byte `end`."""
    count, remaining, last = 0, end, b""
    with open(path, "rb") as file:
        while remaining and (block := file.read(min(remaining, 1 << 20))):
            count, remaining, last = count + block.count(b"\n"), remaining - len(block), block[-1:]
    return count + (last != b"\n")


def _read_parquet(input_slice: InputSlice, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    path = input_slice.inputs[0].path
    with open_parquet(path) as file:
        if not fields.template and fields.text not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise UsageError(f"{path} has no column {fields.text!r} for the text; set `text` to one of {columns}")
        used = None if fields.template else {fields.text, fields.language_field, fields.source_field}
        names = [name for name in file.schema_arrow.names if used is None or name in used]
        number = 0
        location = f"{path}, from row group {input_slice.start}, row"
        try:
            groups = list(range(input_slice.start, input_slice.end))
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=names):
                for record in batch.to_pylist():
                    number += 1
                    yield from _convert(location, number, record, fields, skip)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise CompressionError(str(error)) from None


def _read_text_files(input_slice: InputSlice, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    for number, file in enumerate(input_slice.inputs):
        try:
            text = read_plain_text(Path(file.path))
        except UnicodeDecodeError as error:
            if skip is None:
                raise UsageError(f"{file.path} is not a UTF-8 text: {error}{SKIP_ADVICE}") from None
            skip(number, error)
            continue
        yield Document(text, strip_region(fields.language), fields.source)


def _convert(
    location: str, number: int, record: object, fields: RecordFields, skip: OnInvalid | None
) -> Iterator[Document]:
    """The document of one record, or nothing if it is invalid and `skip` is given."""
    try:
        assert isinstance(record, dict)
        document = fields.to_document(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if skip is None:
            raise UsageError(f"{location} {number}: not a document: {error!r:.200}{SKIP_ADVICE}") from None
        skip(number, error)
        return
    yield document
