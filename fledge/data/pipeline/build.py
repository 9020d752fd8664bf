"""`fledge data build`: raw documents in, a token store out, stage after stage.

    inputs     hash every input file
    read       read, identify, clean, hash and sign documents      -> shards
    copies     which documents are copies of others
    near       which are near copies
    used       how often World's tokens are used (only for a pruned vocabulary)
    tokens     choose and encode
    assemble   one store from all shards, its manifest and report

Each stage leaves pieces behind in the folder `fledge-work` of the store; a build that ended in any way continues from
what is there. The result depends on the config and the inputs alone: not on the number of workers, nor on what was
interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fledge.core.device import count_usable_cores
from fledge.core.errors import DataError, UsageError
from fledge.core.files import describe_disk_error, read_json
from fledge.core.locks import LOCK_NAME, try_lock_folder
from fledge.data.binidx import get_binidx_paths
from fledge.data.pipeline import store_assembly
from fledge.data.pipeline.clean import steps
from fledge.data.pipeline.config import BuildConfig
from fledge.data.pipeline.counts import Count, merge_count_files
from fledge.data.pipeline.dedup.duplicates import find_copies, find_near_copies, partitions
from fledge.data.pipeline.dedup.minhash import MinHasher, rows_per_band
from fledge.data.pipeline.mixture.plan import MixturePlan, make_plan
from fledge.data.pipeline.ray_workers import RayWorkers
from fledge.data.pipeline.report import REPORT, write_report
from fledge.data.pipeline.shards import shards
from fledge.data.pipeline.sources.inputs import InputFile, InputSlice, survey
from fledge.data.pipeline.sources.reader import hash_input, input_record, read_slice
from fledge.data.pipeline.stage_outputs import StageContext, discard, sweep
from fledge.data.pipeline.tokenize import ShardPortion, count_tokens, fixed_spec, most_used, tokenize_shard
from fledge.data.pipeline.validation_split import limits
from fledge.data.pipeline.workers import Function, InlineWorkers, ProcessWorkers, Workers
from fledge.data.store import MANIFEST, PARTS, TOKENIZER, VALIDATION_RECORDS, TokenStore, choose_dtype, open_store
from fledge.tokenizer import Vocabulary

Report = Callable[[str, int, int], None]
WORK = "fledge-work"  # a folder of any other name is the user's
BINIDX_FILES = [file.name for part in PARTS for file in get_binidx_paths(Path(part))]
RESULT_FILES = (*BINIDX_FILES, VALIDATION_RECORDS, TOKENIZER, MANIFEST, REPORT)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class BuildOptions:
    """What does not change the result."""

    workers: int | None = None  # None: one for each core
    ray: bool = False  # run on Ray Data instead
    force: bool = False  # replace another store in the folder
    keep_work: bool = False  # for a later build with other settings

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers is {self.workers}; it must be at least 1")


def silent(_stage: str, _done: int, _total: int) -> None:
    """Report nothing."""


def build(
    config: BuildConfig, base: Path, to: Path, options: BuildOptions | None = None, report: Report = silent
) -> TokenStore:
    """Build the store `to`, or go on building it. `base`: where the paths of the config start.

    A finished store is taken as it is, also where nothing can be written. Raises UsageError where `to` holds something
    else or nothing would be left to train on, DataError where a file is damaged or the disk full.
    """
    options = options or BuildOptions()
    base, to = Path(os.path.abspath(base)), Path(os.path.abspath(to))
    _check(config, base)
    try:
        inputs, slices = survey(config, base, without=to)
        fingerprint = _fingerprint(config, inputs, base)
        _check_folder(to, fingerprint, options)
        with _locked(to, fingerprint) as alone:
            if alone is None:
                return open_store(to)
            if not alone:
                raise UsageError(f"another build is at work in {to}; wait for it, or choose another folder")
            sweep(to / WORK, RESULT_FILES)
            if not _finished(to, fingerprint):
                with _workers(options) as workers:
                    _Build(config, base, to, workers, report).run(inputs, slices, fingerprint)
            if not options.keep_work:
                discard(to / WORK)
    except OSError as error:
        raise DataError(describe_disk_error(error, to, "finished pieces are kept")) from None
    return open_store(to)


@contextmanager
def _locked(to: Path, fingerprint: str) -> Iterator[bool | None]:
    """Whether this build alone works in `to`; None: the store is finished, and its disk takes no lock."""
    with ExitStack() as stack:
        try:
            alone: bool | None = stack.enter_context(try_lock_folder(to / WORK))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            if not _finished(to, fingerprint):
                raise DataError(
                    f"nothing can be written in {to}: {error.strerror}; choose another folder for the store"
                ) from None
            alone = None
        yield alone


class _Build:
    """One run of all stages."""

    def __init__(self, config: BuildConfig, base: Path, to: Path, workers: Workers, report: Report) -> None:
        self.config, self.base, self.to, self.workers, self.report = config, base, to, workers, report
        self.job = StageContext(config, to / WORK)

    def run(self, inputs: list[InputFile], slices: list[InputSlice], fingerprint: str) -> None:
        """From the first stage to the manifest; what is there already is not done again."""
        config = self.config
        files = [file for file in inputs if file.format != "hub"]
        self._begin("inputs", [[file.source, file.name, file.format, file.size, file.changed] for file in inputs])
        self._stage("hashing inputs", hash_input, files, lambda file: input_record(self.job, file))
        reading = (config.sources, config.clean, config.languages, _signing(config), config.cut_characters)
        self._begin("read", _plain(reading), config.piece_bytes, config.on_error)
        self._stage("reading and cleaning", read_slice, slices, lambda piece: self._in("read", piece.name))
        if not shards(self.job):
            raise UsageError(f"no document is left after cleaning: {self._dropped()}; see `clean` in the config")
        bounds = self._deduplicate()
        self.report("choosing", 0, 1)
        plan = make_plan(self.job, bounds)
        spec = self._vocabulary(plan)
        self._begin("tokens", _plain(config.mixture), _plain(config.validation), config.seed, spec)
        self._stage("tokenizing", tokenize_shard, self._portions(plan, spec), lambda one: self._in("tokens", one.name))
        (self.to / MANIFEST).unlink(missing_ok=True)
        about = store_assembly.assemble(
            self.job, self.to, spec, lambda done, total: self.report("writing the store", done, total)
        )
        manifest = store_assembly.manifest(self.job, inputs, fingerprint, {**about, "remarks": list(plan.remarks)})
        write_report(self.to, manifest)
        store_assembly.write_manifest(self.to, manifest)

    def _dropped(self) -> str:
        """What became of all documents that were read, when none is left."""
        totals = merge_count_files(piece / "counts.json" for piece in self.job.pieces("read")).totals()
        read = totals.pop("read", Count()).documents
        why = [f"{stage.removeprefix('dropped: ')} {count.documents:,}" for stage, count in totals.items()]
        return f"{read:,} were read" + (f", dropped: {', '.join(why)}" if why else ", the inputs are empty")

    def _deduplicate(self) -> dict[str, int]:
        """Both stages of it. Returns the limits under which documents may be validation documents."""
        config = self.config
        bounds = limits(
            merge_count_files(piece / "counts.json" for piece in self.job.pieces("read")), config.validation
        )
        if config.dedup.exact or config.dedup.near:
            documents = sum(len(shard.documents) for shard in shards(self.job))
            tasks = partitions(documents, bounds)
            self._begin("copies", bounds, config.seed, len(tasks))
            self._stage("finding copies", find_copies, tasks, lambda one: self._in("copies", one.name))
        if config.dedup.near:
            records = sum(len(shard.bands) for shard in shards(self.job))
            tasks = partitions(records, bounds)
            self._begin("near", config.dedup.threshold, len(tasks))
            self._stage("finding near copies", find_near_copies, tasks, lambda one: self._in("near", one.name))
        return bounds

    def _vocabulary(self, plan: MixturePlan) -> dict[str, Any]:
        """The record of the vocabulary, counted first where it is to be pruned."""
        vocabulary = self.config.vocabulary
        spec = fixed_spec(vocabulary, self.base)
        if spec is None:
            assert isinstance(vocabulary, int)
            self._begin("used", _plain(self.config.mixture), _plain(self.config.validation), self.config.seed)
            path = self.job.folder("used")
            self._stage("counting tokens", count_tokens, self._portions(plan, {}), lambda one: path / f"{one.name}.npy")
            spec = most_used(self.job, vocabulary)
        return spec

    def _portions(self, plan: MixturePlan, spec: dict[str, Any]) -> list[ShardPortion]:
        return [ShardPortion(shard, plan.for_shard(shard), spec) for shard in shards(self.job)]

    def _begin(self, stage: str, *decisive: Any) -> None:
        self.job = self.job.with_stage(stage, *decisive)
        self.job.folder(stage).mkdir(parents=True, exist_ok=True)

    def _in(self, stage: str, name: str) -> Path:
        return self.job.folder(stage) / name

    def _stage(self, label: str, function: Function, tasks: Sequence[Any], result: Callable[[Any], Path]) -> None:
        """Run the tasks whose results are not there yet."""
        left = [task for task in tasks if not result(task).exists()]
        done = len(tasks) - len(left)
        self.report(label, done, len(tasks))
        for _ in self.workers.run(function, self.job, left):
            done += 1
            self.report(label, done, len(tasks))


def _workers(options: BuildOptions) -> AbstractContextManager[Workers]:
    """Ray, processes, or none of them where one worker is enough."""
    if options.ray:
        return RayWorkers()
    count = options.workers or count_usable_cores()
    return ProcessWorkers(count) if count > 1 else nullcontext(InlineWorkers())


def _check(config: BuildConfig, base: Path) -> None:
    """Whatever can be wrong with a config, or missing here, before hours of work."""
    steps(config.clean)
    spec = fixed_spec(config.vocabulary, base)
    choose_dtype(config.dtype, Vocabulary.from_spec(spec).size if spec else 0)
    if config.dedup.near:
        MinHasher(config.dedup)


def _signing(config: BuildConfig) -> Any:
    """What of deduplication decides how documents are read: the threshold only by the bands it asks for."""
    dedup = config.dedup
    return [dedup.permutations, dedup.characters, rows_per_band(dedup)] if dedup.near else None


def _plain(value: Any) -> Any:
    """A part of the config as JSON has it."""
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _fingerprint(config: BuildConfig, inputs: list[InputFile], base: Path) -> str:
    """What a finished store was made from."""
    files = [[file.name, file.size, file.changed] for file in inputs]
    spec = fixed_spec(config.vocabulary, base)
    return hashlib.sha256(json.dumps([asdict(config), files, spec], sort_keys=True).encode()).hexdigest()


def _check_folder(to: Path, fingerprint: str, options: BuildOptions) -> None:
    """Raises UsageError for what must not be replaced, before anything is written there."""
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is a file; name a folder for the store")
    work = to / WORK
    ours = (work / LOCK_NAME).is_file()
    if work.exists() and not ours and not (work.is_dir() and not any(work.iterdir())):
        raise UsageError(f"{work} was not made by a build; rename it, or choose another folder for the store")
    if options.force or not to.is_dir():
        return
    if (to / MANIFEST).is_file():
        if not _made_from(to, fingerprint):
            raise UsageError(
                f"{to} holds a store made from other inputs or settings; choose another folder, or --force"
            )
    elif any(to.iterdir()) and not ours:
        raise UsageError(f"{to} holds files that are no token store; choose another folder, or --force")


def _finished(to: Path, fingerprint: str) -> bool:
    """Whether the store in `to` is just the one that is wanted, and can be used."""
    if not _made_from(to, fingerprint):
        return False
    try:
        for _ in open_store(to).validation_documents():
            pass
    except DataError:
        return False
    return True


def _made_from(to: Path, fingerprint: str) -> bool:
    """Whether a manifest says so."""
    try:
        return bool(read_json(to / MANIFEST)["fingerprint"] == fingerprint)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
