"""The complete build: the same store for any number of workers and any interruptions, and its errors."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import make_config, make_corpus, make_text, read_files, write_jsonl

from fledge.core.errors import ConfigError, DataError, FledgeError, UsageError
from fledge.core.locks import try_lock_folder
from fledge.data.pipeline import build as build_module
from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.pipeline.store_assembly import read_counts
from fledge.data.store import open_store
from fledge.tokenizer import load_world, prune, tokenizer_for, world_vocabulary

pytest.importorskip("rensa")
pytest.importorskip("py3langid")

SUPPORT = Path(__file__).resolve().parents[2] / "support"
ONE_WORKER = BuildOptions(workers=1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in two files, and the store `complete` of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = make_corpus()
    write_jsonl(folder / "corpus1.jsonl", rows[:80])
    write_jsonl(folder / "corpus2.jsonl", [*rows[80:], {"text": "Das ist ein deutscher Satz, und noch einer dazu."}])
    build(make_config(), folder, folder / "complete", ONE_WORKER)
    return folder


def test_a_store_matches_its_manifest(base: Path) -> None:
    store = open_store(base / "complete")
    totals = read_counts(store.manifest).totals()
    assert totals["read"].documents == 121 and totals["stored"].documents == len(store.index("train"))
    assert totals["stored"].tokens == len(store.tokens("train")) == store.manifest["tokens"]["train"]
    assert (store.tokens("train") == 0).sum() == len(store.index("train"))
    assert all(store.index("train")[number][-1] == 0 for number in range(len(store.index("train"))))
    held_out = list(store.validation_documents())
    assert len(held_out) == totals["validation"].documents > 3
    assert {document.language for document in held_out} <= {"en", "de", "code:python"}
    for document in held_out:
        assert 0 < document.bytes <= 500 and len(load_world().decode_bytes(document.ids)) == document.bytes
    by_language = read_counts(store.manifest).group_by("language")["read"]
    assert by_language["de"].documents == 41  # forty with this language, and one identified document
    assert store.vocab_size == 65536 and store.tokenizer_spec == {"kind": "world"}
    assert [file["name"] for file in store.manifest["inputs"]] == ["corpus1.jsonl", "corpus2.jsonl"]
    assert sorted(read_files(base / "complete")) == sorted([*store.manifest["outputs"], "manifest.json", "report.html"])
    assert not [path for path in (base / "complete").iterdir() if path.is_dir()]


def test_the_number_of_workers_does_not_change_the_store(base: Path, tmp_path: Path) -> None:
    build(make_config(), base, tmp_path / "store", BuildOptions(workers=3))
    assert read_files(tmp_path / "store") == read_files(base / "complete")


def test_a_finished_store_is_not_built_again(base: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (base / "complete").iterdir()}
    build(make_config(), base, base / "complete", ONE_WORKER)
    assert {path: path.stat().st_mtime_ns for path in (base / "complete").iterdir()} == before
    with pytest.raises(UsageError, match="contains a store of other inputs or settings"):
        build(make_config(seed=2), base, base / "complete", ONE_WORKER)


class Stopped(Exception):
    """Ends a build early."""


def test_a_stopped_build_resumes(base: Path, tmp_path: Path) -> None:
    """A build can be stopped at every progress report. Each run gets a little further than the one before."""
    rng = random.Random(3)
    stops = 0
    is_done = False
    while not is_done:
        # Each run reports the finished tasks again, so it needs more reports.
        reports_left = rng.randint(1, 6) + 2 * stops

        def stop(stage: str, done: int, total: int) -> None:
            nonlocal reports_left
            reports_left -= 1
            if not reports_left:
                raise Stopped

        try:
            build(make_config(), base, tmp_path / "store", ONE_WORKER, stop)
            is_done = True
        except Stopped:
            stops += 1
            assert stops < 60
    assert stops > 5 and read_files(tmp_path / "store") == read_files(base / "complete")


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from corpora import make_config
from fledge.data.pipeline.build import BuildOptions, build
if __name__ == "__main__":
    build(make_config(), Path({base!r}), Path({to!r}), BuildOptions(workers=2), lambda *step: print(*step, flush=True))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_resumes_after_a_kill(base: Path, tmp_path: Path) -> None:
    """SIGKILL ends the build, with or without its workers, after a random number of tasks, until a run finishes."""
    to, script = tmp_path / "store", tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(SUPPORT), base=str(base), to=str(to)))
    rng = random.Random(11)
    kills = 0
    while True:
        with subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            # Each run reports the finished tasks again, so it needs more reports.
            reports_left = rng.randint(2, 6) + 2 * kills
            for _ in process.stdout:
                reports_left -= 1
                if not reports_left:
                    if rng.random() < 0.5:
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        process.kill()
                    kills += 1
                    break
            process.stdout.close()
            code = process.wait()
        if not reports_left:
            assert code == -signal.SIGKILL and kills < 30
            assert not (to / "manifest.json").exists() or read_files(to) == read_files(base / "complete")
            continue
        break
    assert code == 0 and kills > 3
    assert read_files(to) == read_files(base / "complete")


def test_a_build_with_other_settings_reuses_independent_stages(base: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def record_stage(stage: str, done: int, total: int) -> None:
        if done == 0:
            stages.append(stage)

    options = BuildOptions(workers=1, keep_work=True, force=True)
    build(make_config(), base, tmp_path / "store", options, record_stage)
    assert {"reading and cleaning", "finding copies", "finding near copies", "tokenizing"} <= set(stages)
    stages.clear()
    smaller = make_config(mixture={"groups": [{"name": "all", "max_bytes": 9_000}]})
    build(smaller, base, tmp_path / "store", options, record_stage)
    assert "tokenizing" in stages and not {"reading and cleaning", "finding copies"} & set(stages)


def test_a_second_build_in_the_same_folder_is_refused(base: Path, tmp_path: Path) -> None:
    def start_second(stage: str, done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another build is running"):
            build(make_config(), base, tmp_path / "store", ONE_WORKER)
        raise Stopped

    pytest.importorskip("fcntl")
    with pytest.raises(Stopped):
        build(make_config(), base, tmp_path / "store", ONE_WORKER, start_second)


def test_a_build_does_not_change_the_work_folder_of_a_running_build(base: Path, tmp_path: Path) -> None:
    """While another store replaces a finished store, a build of the finished store is refused."""
    refused = 0

    def build_again(stage: str, done: int, total: int) -> None:
        nonlocal refused
        before = sorted((tmp_path / "store" / build_module.WORK).rglob("*"))
        if (tmp_path / "store" / "manifest.json").is_file():
            with pytest.raises(UsageError, match="another build is running"):
                build(make_config(), base, tmp_path / "store", ONE_WORKER)
            refused += 1
        assert sorted((tmp_path / "store" / build_module.WORK).rglob("*")) == before

    pytest.importorskip("fcntl")
    build(make_config(), base, tmp_path / "store", ONE_WORKER)
    build(make_config(seed=2), base, tmp_path / "store", BuildOptions(workers=1, force=True), build_again)
    assert refused > 5 and open_store(tmp_path / "store").manifest["seed"] == 2


def test_the_work_folder_is_removed_while_it_is_locked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise another process could change it in between."""
    pytest.importorskip("fcntl")
    locked: list[bool] = []

    def remove_work_folder(work: Path) -> None:
        with try_lock_folder(work) as is_locked:
            locked.append(is_locked)

    monkeypatch.setattr(build_module, "remove_work_folder", remove_work_folder)
    for _ in ("first build", "finished store"):
        build(make_config(), base, tmp_path / "store", ONE_WORKER)
    assert locked == [False, False]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_finished_store_may_be_read_only(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A finished store needs no lock. A build in a read-only folder is an error."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    before = sorted(base.rglob("*"))
    monkeypatch.setattr(build_module, "try_lock_folder", refuse)
    assert build(make_config(), base, base / "complete", ONE_WORKER).sha256 == open_store(base / "complete").sha256
    assert sorted(base.rglob("*")) == before
    with pytest.raises(DataError, match=r"store is not writable: .*; choose another folder"):
        build(make_config(), base, tmp_path / "store", ONE_WORKER)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_build_resumes_after_a_full_disk(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def raise_disk_full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "tokenize_shard", raise_disk_full)
        with pytest.raises(DataError, match=r"the disk of .*store is full .* finished parts are kept"):
            build(make_config(), base, tmp_path / "store", ONE_WORKER)
    build(make_config(), base, tmp_path / "store", ONE_WORKER)
    assert read_files(tmp_path / "store") == read_files(base / "complete")


@pytest.mark.parametrize("limit", [700, 3000, 20_000])
def test_a_build_resumes_after_a_file_size_limit(base: Path, tmp_path: Path, limit: int) -> None:
    """The system refuses to write more than `limit` bytes to shards, to their arrays, or to the store."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(DataError, match=r"the disk of .*store is full"):
            build(make_config(), base, tmp_path / "store", ONE_WORKER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    build(make_config(), base, tmp_path / "store", ONE_WORKER)
    assert read_files(tmp_path / "store") == read_files(base / "complete")


def test_dropped_documents_are_counted_by_reason(tmp_path: Path) -> None:
    bodies = ["", " \n ", "short", "long enough to stay, as it is", "\x00\x01"]
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": body, "lang": "en"} for body in bodies])
    settings: dict[str, Any] = {"validation": {"share": 0.0}, "dedup": {"near": False}}
    totals = read_counts(build(make_config(**settings), tmp_path, tmp_path / "store", ONE_WORKER).manifest).totals()
    assert {stage: count.documents for stage, count in totals.items()} == {
        "read": 5,
        "clean": 1,
        "train": 1,
        "stored": 1,
        "dropped: empty": 3,
        "dropped: min_characters": 1,
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_an_invalid_line_stops_the_build_or_is_skipped(base: Path, tmp_path: Path, workers: int) -> None:
    rows = (base / "corpus1.jsonl").read_text().splitlines()
    rows[50] = '{"text": 5}'
    (tmp_path / "corpus1.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=r"corpus1\.jsonl, line 51: not a JSON object"):
        build(make_config(), tmp_path, tmp_path / "store", BuildOptions(workers=workers))
    if workers == 1:
        store = build(make_config(on_error="skip"), tmp_path, tmp_path / "store", ONE_WORKER)
        assert read_counts(store.manifest).totals()["bad"].documents == 1
        assert read_counts(store.manifest).totals()["read"].documents == 79


def test_a_crashed_worker_is_an_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "read_slice", exit_process)
    with pytest.raises(DataError, match=r"a worker process crashed \(exit code 7\)"):
        build(make_config(), base, tmp_path / "store", BuildOptions(workers=2))


def exit_process(_context: Any, _task: Any) -> None:
    """A stage function that ends its process."""
    os._exit(7)


@pytest.mark.parametrize("size", [300, 512])
def test_a_pruned_vocabulary_has_the_most_used_tokens(base: Path, tmp_path: Path, size: int) -> None:
    store = build(make_config(vocabulary=size), base, tmp_path / "store", ONE_WORKER)
    assert store.vocab_size == size and store.tokens("train").max() < size
    tokenizer = tokenizer_for(store.tokenizer_spec)
    complete = open_store(base / "complete")
    index, world_index = store.index("train"), complete.index("train")
    for number in range(9):
        assert tokenizer.decode(index[number]) == load_world().decode(world_index[number])
    used = np.bincount(complete.tokens("train"), minlength=65536)
    used[:257] = 0
    kept = set(tokenizer.vocabulary.kept)
    assert min(used[list(kept)]) >= max(np.delete(used, list(kept)))


def test_uses_a_vocabulary_file_and_int32(base: Path, tmp_path: Path) -> None:
    spec = prune(world_vocabulary(), range(300, 400)).to_spec()
    (base / "small.json").write_text(json.dumps(spec))
    store = build(make_config(vocabulary="small.json", dtype="int32"), base, tmp_path / "store", ONE_WORKER)
    assert store.tokenizer_spec == spec and store.vocab_size == 357
    assert store.tokens("train").dtype == np.dtype("<i4")
    for body, message in (("{}", "cannot be used"), ('{"kind": "bytes"}', "no id to separate documents")):
        (base / "small.json").write_text(body)
        with pytest.raises(ConfigError, match=message):
            build(make_config(vocabulary="small.json"), base, tmp_path / "other", ONE_WORKER)


def test_long_documents_are_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": make_text(1, 300), "lang": "en"}])
    settings: dict[str, Any] = {"validation": {"share": 0.0}, "dedup": {"near": False}}
    store = build(make_config(cut_characters=300, **settings), tmp_path, tmp_path / "store", ONE_WORKER)
    index = store.index("train")
    parts = [load_world().decode(index[number]) for number in range(len(index))]
    assert len(parts) > 3 and "".join(parts) == make_text(1, 300) and all(len(part) <= 300 for part in parts)
    assert read_counts(store.manifest).totals()["train"].documents == 1


def test_a_store_with_changed_files_is_not_opened(base: Path, tmp_path: Path) -> None:
    build(make_config(), base, tmp_path / "store", ONE_WORKER)
    data = (tmp_path / "store" / "train.bin").read_bytes()
    (tmp_path / "store" / "train.bin").write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train\.bin does not have the size in the manifest"):
        open_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json or tokenizer\.json is damaged"):
        open_store(tmp_path / "store")
    with pytest.raises(UsageError, match="other inputs or settings"):
        build(make_config(), base, tmp_path / "store", ONE_WORKER)


def truncate(path: Path) -> None:
    """Remove the last two bytes of a file."""
    path.write_bytes(path.read_bytes()[:-2])


def overwrite(path: Path) -> None:
    """Replace the content of a file, but not its size."""
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.bin", truncate),
        ("train.bin", Path.unlink),
        ("train.idx", overwrite),
        ("validation.jsonl", overwrite),
        ("tokenizer.json", overwrite),
    ],
)
def test_a_damaged_store_is_built_again(base: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(base / "complete", tmp_path / "store")
    damage(tmp_path / "store" / name)
    with pytest.raises(DataError, match=r"build the store again|not a binidx index"):
        list(open_store(tmp_path / "store").validation_documents())
    build(make_config(), base, tmp_path / "store", ONE_WORKER)
    assert read_files(tmp_path / "store") == read_files(base / "complete")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": [{"path": "none*.jsonl"}]}, "there is no such file"),
        ({"clean": ["no_step"]}, "is unknown"),
        (
            {"clean": [{"min_characters": 10**6}]},
            "remains after cleaning: 121 were read, dropped: min_characters 121",
        ),
        ({"vocabulary": "none.json"}, "vocabulary none.json cannot be used"),
    ],
)
def test_invalid_settings_are_named(base: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FledgeError, match=message):
        build(make_config(**settings), base, tmp_path / "store", ONE_WORKER)


def test_the_store_is_not_an_input_of_its_own_build(base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "corpus.jsonl", make_corpus(30))
    settings = make_config(sources=[{"path": "**/*.jsonl"}])
    first = build(settings, tmp_path, tmp_path / "a" / "store", ONE_WORKER)
    assert (tmp_path / "a" / "store" / "validation.jsonl").is_file()
    again = build(settings, tmp_path, tmp_path / "a" / "store", ONE_WORKER)
    assert again.manifest == first.manifest and len(again.manifest["inputs"]) == 1


@pytest.mark.parametrize("pattern", ["../**/*.jsonl", "../configs/../**/*.jsonl", ".."])
def test_the_store_is_not_an_input_through_the_parent_folder(tmp_path: Path, pattern: str) -> None:
    write_jsonl(tmp_path / "a" / "corpus.jsonl", make_corpus(30))
    (tmp_path / "configs").mkdir()
    settings = make_config(sources=[{"path": pattern}])
    first = build(settings, tmp_path / "configs", tmp_path / "store", ONE_WORKER)
    again = build(settings, tmp_path / "configs", tmp_path / "store", ONE_WORKER)
    assert again.manifest == first.manifest
    assert [file["name"] for file in again.manifest["inputs"]] == ["../a/corpus.jsonl"]


def test_folders_with_other_files_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="contains files that are not a token store"):
        build(make_config(), base, tmp_path / "mine", ONE_WORKER)
    with pytest.raises(UsageError, match="is a file"):
        build(make_config(), base, tmp_path / "file", ONE_WORKER)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]
    with pytest.raises(UsageError, match="workers is 0"):
        BuildOptions(workers=0)


def test_files_of_the_user_are_kept(base: Path, tmp_path: Path) -> None:
    """Only files of a build are removed, even with --force. A work folder is not recognized by its name alone."""
    user_files = [
        "work/thesis.txt",
        "work/.a.part",
        "notes/.train.bin.abcdefgh.part",
        ".mine.part",
        "train.bin.old.part",
    ]
    temporary_files = [".train.bin.abcdefgh.part", f"{build_module.WORK}/read-abc/.000000000.abcdefgh.part"]
    for name in [*user_files, *temporary_files, f"{build_module.WORK}/lock"]:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(name)
    build(make_config(), base, tmp_path / "mine", BuildOptions(workers=1, force=True, keep_work=True))
    assert all((tmp_path / "mine" / name).read_text() == name for name in user_files)
    assert not any((tmp_path / "mine" / name).exists() for name in temporary_files)
    build(make_config(), base, tmp_path / "mine", ONE_WORKER)
    assert all((tmp_path / "mine" / name).read_text() == name for name in user_files)
    assert not (tmp_path / "mine" / build_module.WORK).exists()
    (tmp_path / "other" / "work").mkdir(parents=True)
    with pytest.raises(UsageError, match="contains files that are not a token store"):
        build(make_config(), base, tmp_path / "other", ONE_WORKER)
    (tmp_path / "other" / "work").rename(tmp_path / "other" / build_module.WORK)
    (tmp_path / "other" / build_module.WORK / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="was not created by a build"):
        build(make_config(), base, tmp_path / "other", BuildOptions(workers=1, force=True))
    assert (tmp_path / "other" / build_module.WORK / "thesis.txt").read_text() == "years"
