"""The first stage: a slice of the sources becomes shards of cleaned, identified, hashed and signed documents.

One worker, one slice, one folder. Here also: the hash of an input file. Not here: which slices there are (sources.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from fledge.core.errors import DataError, UsageError
from fledge.core.files import hash_file, write_json
from fledge.data.compression import CompressionError, is_compressed, open_decompressed
from fledge.data.documents import Document, OnInvalid, RecordFields, make_line_error, parse_lines, strip_region
from fledge.data.pipeline.clean import CleaningStep, steps
from fledge.data.pipeline.config import BuildConfig
from fledge.data.pipeline.counts import Count, Counts
from fledge.data.pipeline.dedup.minhash import MinHasher
from fledge.data.pipeline.language import LanguageIdentifier
from fledge.data.pipeline.shards import ShardWriter
from fledge.data.pipeline.sources import hub
from fledge.data.pipeline.sources.inputs import InputFile, InputSlice, default_source, open_parquet
from fledge.data.pipeline.stage_outputs import StageContext, whole_folder
from fledge.data.texts import read_plain_text

ROWS = 256  # of a Parquet file at a time
MORE = '; correct or remove it, or leave such lines out with on_error = "skip"'


def hash_input(job: StageContext, file: InputFile) -> None:
    """Leave the SHA-256 of an input file behind."""
    try:
        digest = hash_file(file.path)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}") from None
    write_json(input_record(job, file), digest)


def input_record(job: StageContext, file: InputFile) -> Path:
    """Where that hash is."""
    return job.folder("inputs") / f"{hashlib.sha256(f'{file.source} {file.name}'.encode()).hexdigest()[:24]}.json"


def read_slice(job: StageContext, piece: InputSlice) -> None:
    """Leave the shards and counts of a slice behind."""
    config = job.config
    counts = Counts()
    clean = steps(config.clean)
    identify = _lazily(lambda: LanguageIdentifier(config.languages.characters))
    signer = MinHasher(config.dedup) if config.dedup.near else None

    def skip(_number: int, _error: Exception) -> None:
        counts.add("bad", "", default_source(config.sources[piece.inputs[0].source], piece.inputs[0]), Count(1))

    with (
        whole_folder(job.folder("read") / piece.name) as folder,
        ShardWriter(folder, signer, config.cut_characters) as writer,
    ):
        for document in documents_of(config, piece, skip if config.on_error == "skip" else None):
            language = document.language
            if not language and config.languages.identify:
                language = identify()(document.text)
            count = Count(1, len(document.text.encode()))
            counts.add("read", language, document.source, count)
            text, reason = cleaned(document.text, clean)
            if text:
                counts.add("clean", language, document.source, Count(1, len(text.encode())))
                writer.add(text, language, document.source)
            else:
                counts.add(f"dropped: {reason}", language, document.source, count)
        write_json(folder / "counts.json", counts.rows())


def cleaned(text: str, chosen: Sequence[CleaningStep]) -> tuple[str, str]:
    """What is left of a text after all steps; of a dropped one nothing, and the step that did it."""
    for step in chosen:
        found = step.run(text) if text else ""
        if found is None:
            return "", step.name
        text = found
    return text, "empty"


def _lazily(make: Callable[[], LanguageIdentifier]) -> Callable[[], LanguageIdentifier]:
    """What `make` gives, made when first asked for: most sources name their languages."""
    made: list[LanguageIdentifier] = []

    def get() -> LanguageIdentifier:
        if not made:
            made.append(make())
        return made[0]

    return get


def documents_of(config: BuildConfig, piece: InputSlice, skip: OnInvalid | None) -> Iterator[Document]:
    """The documents of a slice. skip: what to do about a bad one; None raises UsageError with its place."""
    file = piece.inputs[0]
    source = config.sources[file.source]
    fields = RecordFields(
        text=source.text,
        template=source.template,
        language_field=source.language_field,
        source_field=source.source_field,
        language=source.language,
        source=default_source(source, file),
    )
    try:
        if file.format == "jsonl":
            yield from _json_lines(piece, fields, skip)
        elif file.format == "parquet":
            yield from _parquet(piece, fields, skip)
        elif file.format == "hub":
            for number, record in enumerate(hub.records(source, piece.start, piece.end), 1):
                yield from _one(f"{source.hub}, shard {piece.start}, record", number, record, fields, skip)
        else:
            yield from _texts(piece, fields, skip)
    except CompressionError as error:
        names = ", ".join(one.path for one in piece.inputs[:3])
        raise DataError(f"{names}: cannot be read to its end: {error}") from None


def _json_lines(piece: InputSlice, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    path = Path(piece.inputs[0].path)

    def stop(number: int, error: Exception) -> None:
        before = 0 if not piece.start else _lines_before(path, piece.start)
        raise UsageError(f"{make_line_error(path, before + number, error)}{MORE}")

    with open_decompressed(path) as file:
        lines: Iterable[bytes] = file
        if not is_compressed(path):
            lines = _lines_between(file, piece.start, piece.end)
        yield from parse_lines(lines, fields, skip or stop)


def _lines_between(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The lines that begin from byte `start` on and before `end`."""
    at = start
    if start:
        file.seek(start - 1)
        at = start - 1 + len(file.readline())
    while at < end and (line := file.readline()):
        yield line
        at += len(line)


def _lines_before(path: Path, end: int) -> int:
    """How many lines begin before byte `end`."""
    found, left, last = 0, end, b""
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            found, left, last = found + block.count(b"\n"), left - len(block), block[-1:]
    return found + (last != b"\n")


def _parquet(piece: InputSlice, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    path = piece.inputs[0].path
    with open_parquet(path) as file:
        if not fields.template and fields.text not in file.schema_arrow.names:
            have = ", ".join(file.schema_arrow.names)
            raise UsageError(f"{path} has no column {fields.text!r} for the text; its columns: {have}")
        wanted = None if fields.template else {fields.text, fields.language_field, fields.source_field}
        columns = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
        number = 0
        place = f"{path}, from row group {piece.start} on, row"
        try:
            for batch in file.iter_batches(ROWS, row_groups=list(range(piece.start, piece.end)), columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield from _one(place, number, record, fields, skip)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise CompressionError(str(error)) from None


def _texts(piece: InputSlice, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    for number, file in enumerate(piece.inputs):
        try:
            text = read_plain_text(Path(file.path))
        except UnicodeDecodeError as error:
            if skip is None:
                raise UsageError(f"{file.path} is not a text in UTF-8: {error}{MORE}") from None
            skip(number, error)
            continue
        yield Document(text, strip_region(fields.language), fields.source)


def _one(place: str, number: int, record: object, fields: RecordFields, skip: OnInvalid | None) -> Iterator[Document]:
    """The document of one record, or none where it is bad and bad ones are skipped."""
    try:
        assert isinstance(record, dict)
        document = fields.to_document(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if skip is None:
            raise UsageError(f"{place} {number}: not a document: {error!r:.200}{MORE}") from None
        skip(number, error)
        return
    yield document
