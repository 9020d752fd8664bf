"""`fledge data build`: run all stages from raw documents to a token store.

    inputs     hash every input file
    read       read, identify, clean and hash documents, and compute their signatures  -> shards
    copies     find exact duplicates
    near       find near duplicates
    used       count how often World tokens are used (only for a pruned vocabulary)
    tokens     choose and tokenize documents
    assemble   one store from all shards, its manifest and report

Each stage writes its outputs to the folder `fledge-work` in the folder of the store, so that an interrupted build can
resume. The
result depends only on the config and the inputs, not on the number of workers or on interruptions.
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
from fledge.data.pipeline.clean import make_steps
from fledge.data.pipeline.config import BuildConfig
from fledge.data.pipeline.counts import Count, merge_count_files
from fledge.data.pipeline.dedup.duplicates import find_exact_duplicates, find_near_duplicates, make_partitions
from fledge.data.pipeline.dedup.minhash import MinHasher, choose_rows_per_band
from fledge.data.pipeline.mixture.plan import MixturePlan, make_plan
from fledge.data.pipeline.ray_workers import RayWorkers
from fledge.data.pipeline.report import REPORT, write_report
from fledge.data.pipeline.shards import list_shards
from fledge.data.pipeline.sources.inputs import InputFile, InputSlice, find_inputs
from fledge.data.pipeline.sources.reader import get_input_hash_path, hash_input, read_slice
from fledge.data.pipeline.stage_outputs import StageContext, remove_temporary_files, remove_work_folder
from fledge.data.pipeline.store_assembly import assemble_store, build_manifest, write_manifest
from fledge.data.pipeline.tokenize import (
    ShardTask,
    count_tokens,
    prune_to_most_used,
    resolve_vocabulary,
    tokenize_shard,
)
from fledge.data.pipeline.validation_split import compute_hash_limits
from fledge.data.pipeline.workers import InlineWorkers, ProcessWorkers, StageFunction, Workers
from fledge.data.store import MANIFEST, PARTS, TOKENIZER, VALIDATION_RECORDS, TokenStore, choose_dtype, open_store
from fledge.tokenizer import Vocabulary

ReportProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of finished tasks and the number of all tasks."""

WORK = "fledge-work"  # folders with other names belong to the user
BINIDX_FILES = [file.name for part in PARTS for file in get_binidx_paths(Path(part))]
RESULT_FILES = (*BINIDX_FILES, VALIDATION_RECORDS, TOKENIZER, MANIFEST, REPORT)
READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class BuildOptions:
    """Options that do not change the result."""

    workers: int | None = None  # None: one for each core
    ray: bool = False  # run on Ray Data instead
    force: bool = False  # replace another store in the folder
    keep_work: bool = False  # keep the stage outputs for a later build with other settings

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers is {self.workers}; it must be at least 1")


def ignore_progress(_stage: str, _done: int, _total: int) -> None:
    """Report nothing."""


def build(
    config: BuildConfig,
    base: Path,
    to: Path,
    options: BuildOptions | None = None,
    report: ReportProgress = ignore_progress,
) -> TokenStore:
    """Build the store in `to`, or resume its build. base: the folder to which the paths of the config are relative.

    A finished store is not changed, and its folder may be read-only. Raises UsageError if `to` contains something else
    or if no training document remains, DataError if a file is damaged or the disk is full.
    """
    options = options or BuildOptions()
    base, to = Path(os.path.abspath(base)), Path(os.path.abspath(to))
    _check_config(config, base)
    try:
        inputs, slices = find_inputs(config, base, exclude=to)
        fingerprint = _compute_fingerprint(config, inputs, base)
        _check_folder(to, fingerprint, options)
        with _lock_folder(to, fingerprint) as is_locked:
            if is_locked is None:
                return open_store(to)
            if not is_locked:
                raise UsageError(f"another build is running in {to}; wait until it ends, or choose another folder")
            remove_temporary_files(to / WORK, RESULT_FILES)
            if not _is_finished(to, fingerprint):
                with _start_workers(options) as workers:
                    _Build(config, base, to, workers, report).run(inputs, slices, fingerprint)
            if not options.keep_work:
                remove_work_folder(to / WORK)
    except OSError as error:
        raise DataError(describe_disk_error(error, to, "finished parts are kept")) from None
    return open_store(to)


@contextmanager
def _lock_folder(to: Path, fingerprint: str) -> Iterator[bool | None]:
    """Whether this build got the lock of `to`. None: the store is finished, and its folder is read-only."""
    with ExitStack() as stack:
        try:
            is_locked: bool | None = stack.enter_context(try_lock_folder(to / WORK))
        except OSError as error:
            if error.errno not in READ_ONLY_ERRORS:
                raise
            if not _is_finished(to, fingerprint):
                raise DataError(
                    f"{to} is not writable: {error.strerror}; choose another folder for the store"
                ) from None
            is_locked = None
        yield is_locked


class _Build:
    """One run of all stages."""

    def __init__(self, config: BuildConfig, base: Path, to: Path, workers: Workers, report: ReportProgress) -> None:
        self.config, self.base, self.to, self.workers, self.report = config, base, to, workers, report
        self.context = StageContext(config, to / WORK)

    def run(self, inputs: list[InputFile], slices: list[InputSlice], fingerprint: str) -> None:
        """Run all stages and write the manifest last. Tasks with a finished output are skipped."""
        config = self.config
        files = [file for file in inputs if file.format != "hub"]
        self._begin_stage(
            "inputs", [[file.source_index, file.name, file.format, file.size, file.mtime_ns] for file in inputs]
        )
        self._run_stage("hashing inputs", hash_input, files, lambda file: get_input_hash_path(self.context, file))
        read_settings = (
            *(config.sources, config.clean, config.languages),
            *(_select_minhash_settings(config), config.cut_characters),
        )
        self._begin_stage("read", _to_plain(read_settings), config.piece_bytes, config.on_error)
        self._run_stage("reading and cleaning", read_slice, slices, lambda part: self._get_output("read", part.name))
        if not list_shards(self.context):
            raise UsageError(
                f"no document remains after cleaning: {self._describe_dropped()}; see `clean` in the config"
            )
        hash_limits = self._deduplicate()
        self.report("choosing", 0, 1)
        plan = make_plan(self.context, hash_limits)
        spec = self._choose_vocabulary(plan)
        self._begin_stage("tokens", _to_plain(config.mixture), _to_plain(config.validation), config.seed, spec)
        tasks = self._make_shard_tasks(plan, spec)
        self._run_stage("tokenizing", tokenize_shard, tasks, lambda task: self._get_output("tokens", task.name))
        (self.to / MANIFEST).unlink(missing_ok=True)
        contents = assemble_store(
            self.context, self.to, spec, lambda done, total: self.report("writing the store", done, total)
        )
        contents["remarks"] = list(plan.remarks)
        manifest = build_manifest(self.context, inputs, fingerprint, contents)
        write_report(self.to, manifest)
        write_manifest(self.to, manifest)

    def _describe_dropped(self) -> str:
        """The number of documents that were read, and of those that each cleaning step dropped."""
        totals = merge_count_files(part / "counts.json" for part in self.context.list_outputs("read")).totals()
        read = totals.pop("read", Count()).documents
        dropped = [f"{stage.removeprefix('dropped: ')} {count.documents:,}" for stage, count in totals.items()]
        return f"{read:,} were read" + (f", dropped: {', '.join(dropped)}" if dropped else ", the inputs are empty")

    def _deduplicate(self) -> dict[str, int]:
        """Find exact and near duplicates. Returns the hash limits of the candidates for validation."""
        config = self.config
        counts = merge_count_files(part / "counts.json" for part in self.context.list_outputs("read"))
        hash_limits = compute_hash_limits(counts, config.validation)
        if config.dedup.exact or config.dedup.near:
            documents = sum(len(shard.documents) for shard in list_shards(self.context))
            tasks = make_partitions(documents, hash_limits)
            self._begin_stage("copies", hash_limits, config.seed, len(tasks))
            self._run_stage(
                "finding copies", find_exact_duplicates, tasks, lambda task: self._get_output("copies", task.name)
            )
        if config.dedup.near:
            records = sum(len(shard.bands) for shard in list_shards(self.context))
            tasks = make_partitions(records, hash_limits)
            self._begin_stage("near", config.dedup.threshold, len(tasks))
            self._run_stage(
                "finding near copies", find_near_duplicates, tasks, lambda task: self._get_output("near", task.name)
            )
        return hash_limits

    def _choose_vocabulary(self, plan: MixturePlan) -> dict[str, Any]:
        """The specification of the vocabulary. For a pruned one, the tokens of the training text are counted."""
        vocabulary = self.config.vocabulary
        spec = resolve_vocabulary(vocabulary, self.base)
        if spec is None:
            assert isinstance(vocabulary, int)
            settings = _to_plain(self.config.mixture), _to_plain(self.config.validation), self.config.seed
            self._begin_stage("used", *settings)
            tasks = self._make_shard_tasks(plan, {})
            self._run_stage(
                "counting tokens", count_tokens, tasks, lambda task: self._get_output("used", f"{task.name}.npy")
            )
            spec = prune_to_most_used(self.context, vocabulary)
        return spec

    def _make_shard_tasks(self, plan: MixturePlan, spec: dict[str, Any]) -> list[ShardTask]:
        return [ShardTask(shard, plan.for_shard(shard), spec) for shard in list_shards(self.context)]

    def _begin_stage(self, stage: str, *settings: Any) -> None:
        """Create the folder of a stage. settings: all settings that determine its outputs, besides earlier stages."""
        self.context = self.context.with_stage(stage, *settings)
        self.context.folder(stage).mkdir(parents=True, exist_ok=True)

    def _get_output(self, stage: str, name: str) -> Path:
        return self.context.folder(stage) / name

    def _run_stage(
        self, label: str, function: StageFunction, tasks: Sequence[Any], get_output: Callable[[Any], Path]
    ) -> None:
        """Run the tasks whose output does not exist yet."""
        pending = [task for task in tasks if not get_output(task).exists()]
        done = len(tasks) - len(pending)
        self.report(label, done, len(tasks))
        for _ in self.workers.run(function, self.context, pending):
            done += 1
            self.report(label, done, len(tasks))


def _start_workers(options: BuildOptions) -> AbstractContextManager[Workers]:
    """Run on Ray, in worker processes, or, with one worker, in this process."""
    if options.ray:
        return RayWorkers()
    count = options.workers or count_usable_cores()
    return ProcessWorkers(count) if count > 1 else nullcontext(InlineWorkers())


def _check_config(config: BuildConfig, base: Path) -> None:
    """Detect invalid settings and missing packages before the build begins."""
    make_steps(config.clean)
    spec = resolve_vocabulary(config.vocabulary, base)
    choose_dtype(config.dtype, Vocabulary.from_spec(spec).size if spec else 0)
    if config.dedup.near:
        MinHasher(config.dedup)


def _select_minhash_settings(config: BuildConfig) -> Any:
    """The deduplication settings that the read stage depends on. The threshold only determines the band size."""
    dedup = config.dedup
    return [dedup.permutations, dedup.characters, choose_rows_per_band(dedup)] if dedup.near else None


def _to_plain(value: Any) -> Any:
    """A part of the config as JSON-compatible values."""
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _compute_fingerprint(config: BuildConfig, inputs: list[InputFile], base: Path) -> str:
    """A hash of the config, the inputs and the vocabulary of a store."""
    files = [[file.name, file.size, file.mtime_ns] for file in inputs]
    spec = resolve_vocabulary(config.vocabulary, base)
    return hashlib.sha256(json.dumps([asdict(config), files, spec], sort_keys=True).encode()).hexdigest()


def _check_folder(to: Path, fingerprint: str, options: BuildOptions) -> None:
    """Raises UsageError if the folder contains something that the build must not replace."""
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is a file; name a folder for the store")
    work = to / WORK
    is_work_folder = (work / LOCK_NAME).is_file()
    if work.exists() and not is_work_folder and not (work.is_dir() and not any(work.iterdir())):
        raise UsageError(f"{work} was not created by a build; rename it, or choose another folder for the store")
    if options.force or not to.is_dir():
        return
    if (to / MANIFEST).is_file():
        if not _has_fingerprint(to, fingerprint):
            raise UsageError(
                f"{to} contains a store of other inputs or settings; choose another folder, or replace it with --force"
            )
    elif any(to.iterdir()) and not is_work_folder:
        raise UsageError(f"{to} contains files that are not a token store; choose another folder, or use --force")


def _is_finished(to: Path, fingerprint: str) -> bool:
    """Whether `to` contains a finished, undamaged store with this fingerprint."""
    if not _has_fingerprint(to, fingerprint):
        return False
    try:
        for _ in open_store(to).validation_documents():
            pass
    except DataError:
        return False
    return True


def _has_fingerprint(to: Path, fingerprint: str) -> bool:
    """Whether the manifest in `to` has this fingerprint."""
    try:
        return bool(read_json(to / MANIFEST)["fingerprint"] == fingerprint)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
