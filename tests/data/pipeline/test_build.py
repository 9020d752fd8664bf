"""The whole build: the same store for any workers and any interruptions, and errors."""

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
from fledge.data.pipeline import build as module
from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.pipeline.store_assembly import read_counts
from fledge.data.store import open_store
from fledge.tokenizer import load_world, prune, tokenizer_for, world_vocabulary

pytest.importorskip("rensa")
pytest.importorskip("py3langid")

SUPPORT = Path(__file__).resolve().parents[2] / "support"
ONE = BuildOptions(workers=1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in two files, and `whole`, the store of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = make_corpus()
    write_jsonl(folder / "corpus1.jsonl", rows[:80])
    write_jsonl(folder / "corpus2.jsonl", [*rows[80:], {"text": "Das ist ein deutscher Satz, und noch einer dazu."}])
    build(make_config(), folder, folder / "whole", ONE)
    return folder


def test_a_store_holds_what_its_manifest_says(base: Path) -> None:
    store = open_store(base / "whole")
    totals = read_counts(store.manifest).totals()
    assert totals["read"].documents == 121 and totals["stored"].documents == len(store.index("train"))
    assert totals["stored"].tokens == len(store.tokens("train")) == store.manifest["tokens"]["train"]
    assert (store.tokens("train") == 0).sum() == len(store.index("train"))
    assert all(store.index("train")[at][-1] == 0 for at in range(len(store.index("train"))))
    spans = list(store.documents())
    assert len(spans) == totals["validation"].documents > 3
    assert {span.language for span in spans} <= {"en", "de", "code:python"}
    for span in spans:
        assert 0 < span.bytes <= 500 and len(load_world().decode_bytes(span.ids)) == span.bytes
    by_language = read_counts(store.manifest).group_by("language")["read"]
    assert by_language["de"].documents == 41  # forty that say so, and one that was identified
    assert store.vocab_size == 65536 and store.tokenizer_spec == {"kind": "world"}
    assert [one["name"] for one in store.manifest["inputs"]] == ["corpus1.jsonl", "corpus2.jsonl"]
    assert sorted(read_files(base / "whole")) == sorted([*store.manifest["outputs"], "manifest.json", "report.html"])
    assert not [path for path in (base / "whole").iterdir() if path.is_dir()]


def test_the_number_of_workers_changes_nothing(base: Path, tmp_path: Path) -> None:
    build(make_config(), base, tmp_path / "store", BuildOptions(workers=3))
    assert read_files(tmp_path / "store") == read_files(base / "whole")


def test_a_finished_store_is_not_made_again(base: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (base / "whole").iterdir()}
    build(make_config(), base, base / "whole", ONE)
    assert {path: path.stat().st_mtime_ns for path in (base / "whole").iterdir()} == before
    with pytest.raises(UsageError, match="made from other inputs or settings"):
        build(make_config(seed=2), base, base / "whole", ONE)


class Stopped(Exception):
    """The end of a run in the middle."""


def test_a_build_that_is_stopped_anywhere_goes_on(base: Path, tmp_path: Path) -> None:
    """Every report of progress is a place to stop at; each run gets a little further than the one before."""
    rng = random.Random(3)
    stops = 0
    done = False
    while not done:
        left = rng.randint(1, 6) + 2 * stops  # every run says again what is finished, so it must get further

        def stop(stage: str, done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Stopped

        try:
            build(make_config(), base, tmp_path / "store", ONE, stop)
            done = True
        except Stopped:
            stops += 1
            assert stops < 60
    assert stops > 5 and read_files(tmp_path / "store") == read_files(base / "whole")


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
def test_kill_minus_nine_loses_and_corrupts_nothing(base: Path, tmp_path: Path) -> None:
    """Killed with its workers, or without them, after a random number of pieces, until a run comes through."""
    to, script = tmp_path / "store", tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(SUPPORT), base=str(base), to=str(to)))
    rng = random.Random(11)
    kills = 0
    while True:
        with subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            left = rng.randint(2, 6) + 2 * kills  # every run says again what is finished, so it must get further
            for _ in process.stdout:
                left -= 1
                if not left:
                    if rng.random() < 0.5:
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        process.kill()
                    kills += 1
                    break
            process.stdout.close()
            code = process.wait()
        if not left:
            assert code == -signal.SIGKILL and kills < 30
            assert not (to / "manifest.json").exists() or read_files(to) == read_files(base / "whole")
            continue
        break
    assert code == 0 and kills > 3
    assert read_files(to) == read_files(base / "whole")


def test_work_is_taken_over_by_settings_that_do_not_touch_it(base: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def note(stage: str, done: int, total: int) -> None:
        if done == 0:
            seen.append(stage)

    options = BuildOptions(workers=1, keep_work=True, force=True)
    build(make_config(), base, tmp_path / "store", options, note)
    assert {"reading and cleaning", "finding copies", "finding near copies", "tokenizing"} <= set(seen)
    seen.clear()
    build(
        make_config(mixture={"groups": [{"name": "all", "max_bytes": 9_000}]}), base, tmp_path / "store", options, note
    )
    assert "tokenizing" in seen and not {"reading and cleaning", "finding copies"} & set(seen)


def test_two_builds_in_one_folder(base: Path, tmp_path: Path) -> None:
    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another build is at work"):
            build(make_config(), base, tmp_path / "store", ONE)
        raise Stopped

    pytest.importorskip("fcntl")
    with pytest.raises(Stopped):
        build(make_config(), base, tmp_path / "store", ONE, second)


def test_a_finished_build_leaves_the_work_of_another_one_alone(base: Path, tmp_path: Path) -> None:
    """A store is there, another one is being built over it, and the first one is asked for again."""
    refused = 0

    def again(stage: str, done: int, total: int) -> None:
        nonlocal refused
        before = sorted((tmp_path / "store" / module.WORK).rglob("*"))
        if (tmp_path / "store" / "manifest.json").is_file():
            with pytest.raises(UsageError, match="another build is at work"):
                build(make_config(), base, tmp_path / "store", ONE)
            refused += 1
        assert sorted((tmp_path / "store" / module.WORK).rglob("*")) == before

    pytest.importorskip("fcntl")
    build(make_config(), base, tmp_path / "store", ONE)
    build(make_config(seed=2), base, tmp_path / "store", BuildOptions(workers=1, force=True), again)
    assert refused > 5 and open_store(tmp_path / "store").manifest["seed"] == 2


def test_work_is_removed_while_it_is_locked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another process could have changed it in between."""
    pytest.importorskip("fcntl")
    seen: list[bool] = []

    def discard(work: Path) -> None:
        with try_lock_folder(work) as alone:
            seen.append(alone)

    monkeypatch.setattr(module, "discard", discard)
    for _ in ("built", "found finished"):
        build(make_config(), base, tmp_path / "store", ONE)
    assert seen == [False, False]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_in_which_nothing_can_be_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A finished store needs no lock; anything else needs another folder."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    before = sorted(base.rglob("*"))
    monkeypatch.setattr(module, "try_lock_folder", refuse)
    assert build(make_config(), base, base / "whole", ONE).sha256 == open_store(base / "whole").sha256
    assert sorted(base.rglob("*")) == before
    with pytest.raises(DataError, match=r"nothing can be written in .*store: .*; choose another folder"):
        build(make_config(), base, tmp_path / "store", ONE)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(module, "tokenize_shard", full)
        with pytest.raises(DataError, match=r"the disk of .*store is full .* finished pieces are kept"):
            build(make_config(), base, tmp_path / "store", ONE)
    build(make_config(), base, tmp_path / "store", ONE)
    assert read_files(tmp_path / "store") == read_files(base / "whole")


@pytest.mark.parametrize("limit", [700, 3000, 20_000])
def test_a_disk_that_is_full_for_real(base: Path, tmp_path: Path, limit: int) -> None:
    """The system refuses to write past a limit: to shards, to their index, to the store."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(DataError, match=r"the disk of .*store is full"):
            build(make_config(), base, tmp_path / "store", ONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    build(make_config(), base, tmp_path / "store", ONE)
    assert read_files(tmp_path / "store") == read_files(base / "whole")


def test_empty_documents_and_reasons(tmp_path: Path) -> None:
    bodies = ["", " \n ", "short", "long enough to stay, as it is", "\x00\x01"]
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": body, "lang": "en"} for body in bodies])
    settings: dict[str, Any] = {"validation": {"share": 0.0}, "dedup": {"near": False}}
    totals = read_counts(build(make_config(**settings), tmp_path, tmp_path / "store", ONE).manifest).totals()
    assert {stage: count.documents for stage, count in totals.items()} == {
        "read": 5,
        "clean": 1,
        "train": 1,
        "stored": 1,
        "dropped: empty": 3,
        "dropped: min_characters": 1,
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines(base: Path, tmp_path: Path, workers: int) -> None:
    rows = (base / "corpus1.jsonl").read_text().splitlines()
    rows[50] = '{"text": 5}'
    (tmp_path / "corpus1.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=r"corpus1\.jsonl, line 51: not a JSON object"):
        build(make_config(), tmp_path, tmp_path / "store", BuildOptions(workers=workers))
    if workers == 1:
        store = build(make_config(on_error="skip"), tmp_path, tmp_path / "store", ONE)
        assert read_counts(store.manifest).totals()["bad"].documents == 1
        assert read_counts(store.manifest).totals()["read"].documents == 79


def test_a_worker_that_dies(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_slice", exits)
    with pytest.raises(DataError, match=r"a worker process ended by itself \(exit code 7\)"):
        build(make_config(), base, tmp_path / "store", BuildOptions(workers=2))


def exits(_job: Any, _task: Any) -> None:
    """A stage function that takes its process along."""
    os._exit(7)


@pytest.mark.parametrize("size", [300, 512])
def test_a_pruned_vocabulary(base: Path, tmp_path: Path, size: int) -> None:
    store = build(make_config(vocabulary=size), base, tmp_path / "store", ONE)
    assert store.vocab_size == size and store.tokens("train").max() < size
    tokenizer = tokenizer_for(store.tokenizer_spec)
    whole = open_store(base / "whole")
    index, theirs = store.index("train"), whole.index("train")
    assert [tokenizer.decode(index[at]) for at in range(9)] == [load_world().decode(theirs[at]) for at in range(9)]
    used = np.bincount(whole.tokens("train"), minlength=65536)
    used[:257] = 0
    kept = set(tokenizer.vocabulary.kept)
    assert min(used[list(kept)]) >= max(np.delete(used, list(kept)))


def test_a_vocabulary_file_and_int32(base: Path, tmp_path: Path) -> None:
    spec = prune(world_vocabulary(), range(300, 400)).to_spec()
    (base / "small.json").write_text(json.dumps(spec))
    store = build(make_config(vocabulary="small.json", dtype="int32"), base, tmp_path / "store", ONE)
    assert store.tokenizer_spec == spec and store.vocab_size == 357
    assert store.tokens("train").dtype == np.dtype("<i4")
    for body, message in (("{}", "cannot be used"), ('{"kind": "bytes"}', "no id to separate documents")):
        (base / "small.json").write_text(body)
        with pytest.raises(ConfigError, match=message):
            build(make_config(vocabulary="small.json"), base, tmp_path / "other", ONE)


def test_long_documents_are_cut(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": make_text(1, 300), "lang": "en"}])
    settings: dict[str, Any] = {"validation": {"share": 0.0}, "dedup": {"near": False}}
    store = build(make_config(cut_characters=300, **settings), tmp_path, tmp_path / "store", ONE)
    index = store.index("train")
    parts = [load_world().decode(index[at]) for at in range(len(index))]
    assert len(parts) > 3 and "".join(parts) == make_text(1, 300) and all(len(part) <= 300 for part in parts)
    assert read_counts(store.manifest).totals()["train"].documents == 1


def test_changed_files_are_not_trusted(base: Path, tmp_path: Path) -> None:
    """A store whose files were changed afterwards is not opened."""
    build(make_config(), base, tmp_path / "store", ONE)
    data = (tmp_path / "store" / "train.bin").read_bytes()
    (tmp_path / "store" / "train.bin").write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train\.bin has not the size that the manifest records"):
        open_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json or tokenizer\.json is damaged"):
        open_store(tmp_path / "store")
    with pytest.raises(UsageError, match="other inputs or settings"):
        build(make_config(), base, tmp_path / "store", ONE)


def cut(path: Path) -> None:
    """The last bytes of a file go."""
    path.write_bytes(path.read_bytes()[:-2])


def overwritten(path: Path) -> None:
    """The size stays."""
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.bin", cut),
        ("train.bin", Path.unlink),
        ("train.idx", overwritten),
        ("validation.jsonl", overwritten),
        ("tokenizer.json", overwritten),
    ],
)
def test_a_damaged_store_is_built_again(base: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(base / "whole", tmp_path / "store")
    damage(tmp_path / "store" / name)
    with pytest.raises(DataError, match=r"build the store again|not a binidx index"):
        list(open_store(tmp_path / "store").documents())
    build(make_config(), base, tmp_path / "store", ONE)
    assert read_files(tmp_path / "store") == read_files(base / "whole")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": [{"path": "none*.jsonl"}]}, "there is no such file"),
        ({"clean": ["no_step"]}, "is unknown"),
        ({"clean": [{"min_characters": 10**6}]}, "after cleaning: 121 were read, dropped: min_characters 121"),
        ({"vocabulary": "none.json"}, "vocabulary none.json cannot be used"),
    ],
)
def test_mistakes(base: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FledgeError, match=message):
        build(make_config(**settings), base, tmp_path / "store", ONE)


def test_a_store_that_a_pattern_finds_is_no_input(base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "corpus.jsonl", make_corpus(30))
    settings = make_config(sources=[{"path": "**/*.jsonl"}])
    first = build(settings, tmp_path, tmp_path / "a" / "store", ONE)
    assert (tmp_path / "a" / "store" / "validation.jsonl").is_file()
    again = build(settings, tmp_path, tmp_path / "a" / "store", ONE)
    assert again.manifest == first.manifest and len(again.manifest["inputs"]) == 1


@pytest.mark.parametrize("pattern", ["../**/*.jsonl", "../configs/../**/*.jsonl", ".."])
def test_a_store_that_a_pattern_finds_through_the_folder_above(tmp_path: Path, pattern: str) -> None:
    write_jsonl(tmp_path / "a" / "corpus.jsonl", make_corpus(30))
    (tmp_path / "configs").mkdir()
    settings = make_config(sources=[{"path": pattern}])
    first = build(settings, tmp_path / "configs", tmp_path / "store", ONE)
    again = build(settings, tmp_path / "configs", tmp_path / "store", ONE)
    assert again.manifest == first.manifest
    assert [one["name"] for one in again.manifest["inputs"]] == ["../a/corpus.jsonl"]


def test_folders_that_are_not_for_stores(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="holds files that are no token store"):
        build(make_config(), base, tmp_path / "mine", ONE)
    with pytest.raises(UsageError, match="is a file"):
        build(make_config(), base, tmp_path / "file", ONE)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]
    with pytest.raises(UsageError, match="workers is 0"):
        BuildOptions(workers=0)


def test_what_is_the_users_stays(base: Path, tmp_path: Path) -> None:
    """A folder of the user's is not taken for ours by its name, and only what is ours is removed, even with --force."""
    theirs = ["work/thesis.txt", "work/.a.part", "notes/.train.bin.abcdefgh.part", ".mine.part", "train.bin.old.part"]
    left = [".train.bin.abcdefgh.part", f"{module.WORK}/read-abc/.000000000.abcdefgh.part"]
    for name in [*theirs, *left, f"{module.WORK}/lock"]:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(name)
    build(make_config(), base, tmp_path / "mine", BuildOptions(workers=1, force=True, keep_work=True))
    assert all((tmp_path / "mine" / name).read_text() == name for name in theirs)
    assert not any((tmp_path / "mine" / name).exists() for name in left)
    build(make_config(), base, tmp_path / "mine", ONE)
    assert all((tmp_path / "mine" / name).read_text() == name for name in theirs)
    assert not (tmp_path / "mine" / module.WORK).exists()
    (tmp_path / "other" / "work").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds files that are no token store"):
        build(make_config(), base, tmp_path / "other", ONE)
    (tmp_path / "other" / "work").rename(tmp_path / "other" / module.WORK)
    (tmp_path / "other" / module.WORK / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="was not made by a build"):
        build(make_config(), base, tmp_path / "other", BuildOptions(workers=1, force=True))
    assert (tmp_path / "other" / module.WORK / "thesis.txt").read_text() == "years"
