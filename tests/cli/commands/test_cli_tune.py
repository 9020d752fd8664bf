"""`fledge tune`: a dry run, each mode to its result, merging, converting, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import random_checkpoint

from fledge.checkpoint import describe_base, read, read_adapter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    talk = [{"role": "user", "content": "Hi\x1b"}, {"role": "assistant", "content": "tweet é"}]
    records = [{"messages": talk}, {"text": "tweet " * 20}, {"messages": [{**talk[0], "content": "x" * 90}, talk[1]]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_dry_run_shows_everything_and_writes_nothing(
    fledge: Any, byte_model: Path, data: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    result = fledge("tune", "lora", byte_model, data, "--length", 60, "--dry-run", "--to", tmp_path / "run")
    assert result.code == 0 and sorted(tmp_path.iterdir()) == before
    rows = dict(line.split(maxsplit=1) for line in result.text.splitlines()[:10] if "  " in line)
    assert rows["examples"] == f"2 in {data}: conversations 1, texts 1"
    answer = len(" tweet é\n\n".encode())
    assert (
        rows["tokens"] == f"{len('User: Hi?') + 2 + len('Assistant:') + answer + 61}, {answer + 60} of them in the loss"
    )
    assert "2 examples" in result.text and "lines 2, 3" in result.text and "1 without tokens in the loss" in result.text
    for word in ("MiB", "seconds", "of 4 examples", "0.0002 to 2e-05"):
        assert word in result.text, result.text
    assert "User: Hi\x1b\n\nAssistant:⟦ tweet é\n\n⟧" in result.text
    without_folder = fledge("tune", "lora", byte_model, data, "--length", 60, "--dry-run")
    assert without_folder.code == 0 and without_folder.text.splitlines()[:3] == result.text.splitlines()[:3]


@pytest.mark.parametrize("mode", ["full", "lora", "state"])
def test_a_run_ends_with_the_command_that_uses_it(
    fledge: Any, byte_model: Path, data: Path, tmp_path: Path, mode: str
) -> None:
    folder = tmp_path / "my run"
    result = fledge("tune", mode, byte_model, data, "--to", folder, "--steps", 3, "--batch", 2, "--validate", data)
    assert result.code == 0, result.messages
    assert "step 3  loss" in result.text and "validation_loss" in result.text
    (line,) = [line for line in result.text.splitlines() if line.startswith("try it:")]
    words = shlex.split(line.removeprefix("try it:"))
    assert words[:2] == ["fledge", "chat"]
    assert fledge(*words[1:], "--max-tokens", 3, stdin=b"hi\n").code == 0
    assert fledge("generate", "hi", *words[2:], "--max-tokens", 3, "--json").code == 0
    again = fledge("tune", mode, byte_model, data, "--to", folder, "--steps", 3, "--batch", 2, "--validate", data)
    assert again.code == 0 and "step 3" not in again.text  # nothing is left to do


def test_merging(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    fledge("tune", "lora", byte_model, data, "--to", tmp_path / "run", "--steps", 3, "--rate", "0.05")
    adapter, target = tmp_path / "run" / "adapter.safetensors", tmp_path / "merged.safetensors"
    result = fledge("tune", "merge", byte_model, adapter, "--to", target)
    assert result.code == 0 and "verified: the adapter changes logits by up to" in result.text
    same = [
        json.loads(fledge("generate", "hi", "--max-tokens", 8, "--seed", 1, "--json", *model).text)["ids"]
        for model in (["-m", target], ["-m", byte_model, "--adapter", adapter])
    ]
    assert same[0] == same[1]
    fledge("tune", "merge", byte_model, adapter, "--to", target).check_error(1, "exists", "--force")


def test_a_wrong_base(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    fledge("tune", "lora", byte_model, data, "--to", tmp_path / "run", "--steps", 1)
    adapter, other = tmp_path / "run" / "adapter.safetensors", tmp_path / "other.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=16, vocab_size=256, seed=1), other)
    words = ("was trained on another model: bytes", "--any-base")
    fledge("generate", "hi", "-m", other, "--adapter", adapter).check_error(1, *words)
    fledge("tune", "merge", other, adapter, "--to", tmp_path / "m.pth").check_error(1, *words)
    rest = ("--adapter", adapter, "--any-base", "--max-tokens", 2)
    assert fledge("generate", "hi", "-m", other, *rest).code == 0
    fledge("generate", "hi", "-m", adapter).check_error(1, "is a LoRA adapter", "--adapter")
    last = tmp_path / "run" / "last.pt"
    fledge("generate", "hi", "-m", byte_model, "--adapter", last).check_error(
        1, "not its result; give the model, adapter"
    )


def test_info_shows_the_type_of_an_adapter(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    more = ("--rank", 5, "--targets", "att.key,ffn.value", "--train-parts", "ln_out")
    fledge("tune", "lora", byte_model, data, "--to", tmp_path / "run", "--steps", 1, *more)
    adapter = tmp_path / "run" / "adapter.safetensors"
    text = fledge("info", adapter).text
    for words in ("LoRA", "rank", "alpha", "32", "att.key, ffn.value", "bytes: RWKV-6 Finch, 2 layers, width 16, "):
        assert words in text, text
    assert "2 tensors, first: ln_out.bias" in text and "data.jsonl" in text
    record = json.loads(fledge("info", adapter, "--json").text)
    assert (record["rank"], record["parts"]) == (5, ["ln_out.bias", "ln_out.weight"])
    assert record["base"]["identity"] == read_adapter(adapter).base.identity  # type: ignore[union-attr]
    fledge("tune", "state", byte_model, data, "--to", tmp_path / "state", "--steps", 1)
    assert "tuned state" in fledge("info", tmp_path / "state" / "state.safetensors").text


def test_converting_to_rwkv_peft_and_back(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    fledge("tune", "lora", byte_model, data, "--to", tmp_path / "run", "--steps", 1)
    ours, theirs, back = tmp_path / "run" / "adapter.safetensors", tmp_path / "lora.pth", tmp_path / "back.safetensors"
    result = fledge("tune", "convert", ours, theirs)
    assert result.code == 0 and "a .pth cannot hold alpha 32" in result.messages
    fledge("generate", "hi", "-m", byte_model, "--adapter", theirs).check_error(
        2, "does not record its alpha", "--alpha"
    )
    assert fledge("generate", "hi", "-m", byte_model, "--adapter", theirs, "--alpha", 32, "--max-tokens", 2).code == 0
    assert fledge("tune", "convert", theirs, back, "--alpha", 32, "--base", byte_model).code == 0
    first, last = read_adapter(ours), read_adapter(back)
    assert first.base == last.base and first.alpha == last.alpha
    assert all(torch.equal(first.tensors[name], last.tensors[name]) for name in last.tensors)


def test_conversion_on_a_full_disk_is_one_line(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    fledge("tune", "lora", byte_model, data, "--to", tmp_path / "run", "--steps", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        result = fledge("tune", "convert", tmp_path / "run" / "adapter.safetensors", tmp_path / "lora.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    result.check_error(1, f"the disk of {tmp_path} is full", "lora.pth cannot be written; free some space")
    assert not (tmp_path / "lora.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lora", "BASE", "DATA"], 2, ["--to FOLDER", "--dry-run"]),
        (["lora", "BASE", "gone.jsonl", "--to", "x"], 2, ["there is no file gone.jsonl"]),
        (["lora", "BASE", "DATA", "--to", "x", "--length", "0"], 2, ["length is 0"]),
        (["lora", "BASE", "DATA", "--to", "x", "--targets", "query"], 2, ["'query' is unknown"]),
        (["lora", "BASE", "DATA", "--to", "x", "--rank", "0"], 2, ["a rank of at least 1"]),
        (["state", "BASE", "DATA", "--to", "x", "--template", "vicuna"], 2, ["template 'vicuna' is unknown"]),
        (["full", "BASE", "DATA", "--to", "x", "--rate", "-1"], 1, ["0 < min_lr <= max_lr"]),
        (["full", "BASE", "DATA", "--to", "x", "--rate", "0"], 1, ["learning rate would fall from 0 to 0; it needs"]),
        (["full", "BASE", "DATA", "--to", "x", "--rate", "1e38"], 1, ["0 < min_lr <= max_lr <= 10"]),
        (["lora", "BASE", "DATA", "--to", "x", "--rank", "100000000000"], 1, ["rank is 100000000000; it must be from"]),
        (["lora", "BASE", "DATA", "--to", "x", "--alpha", "inf"], 1, ["alpha is inf"]),
        (["full", "BASE", "DATA", "--to", "x", "--seed", "99999999999999999999"], 1, ["seed is 99999999999999999999"]),
        (["full", "BASE", "DATA", "--to", "x", "--steps", "9999999999"], 1, ["steps is 9999999999; it must be from 1"]),
        (["full", "BASE", "DATA", "--to", "x", "--length", "9999999999"], 1, ["length is 9999999999; it must be"]),
        (["full", "BASE", "DATA", "--to", "x", "--batch", "9999999999"], 1, ["batch is 9999999999; it must be"]),
        (["full", "BASE", "DATA", "--to", "x", "--accumulate", "9999999999"], 1, ["accumulate is 9999999999; it must"]),
        (["full", "BASE", "DATA", "--to", "x", "--epochs", "1e300"], 1, ["epochs are 1e+300; they must be at most"]),
        (["half"], 2, ["No such command 'half'"]),
        (["merge", "BASE", "BASE", "--to", "m.pth"], 1, ["is a whole model, not an adapter"]),
        (["convert", "BASE", "m.safetensors"], 1, ["is a whole model, not an adapter"]),
    ],
)
def test_mistakes(
    fledge: Any,
    byte_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: Any,
    arguments: list[str],
    code: int,
    words: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"BASE": str(byte_model), "DATA": str(data)}
    fledge("tune", *(names.get(word, word) for word in arguments)).check_error(code, *words)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("mode", ["full", "lora", "state"])
def test_chat_uses_the_template_of_the_tuning(
    fledge: Any, byte_model: Path, data: Path, tmp_path: Path, mode: str
) -> None:
    result = fledge("tune", mode, byte_model, data, "--to", tmp_path / "run", "--steps", 1, "--template", "qa")
    assert ("template", "qa") in [tuple(line.split()) for line in result.text.splitlines()]
    (line,) = [line for line in result.text.splitlines() if line.startswith("try it:")]
    words = shlex.split(line.removeprefix("try it:"))[1:]
    talk = b"hi\n/history\n"
    assert fledge(*words, "--max-tokens", 2, stdin=talk).messages.startswith("Question: hi\nAnswer")
    assert fledge(*words, "--template", "world", "--max-tokens", 2, stdin=talk).messages.startswith("User: hi\n")
    if mode == "full":  # what is tuned further, is tuned in the same template
        again = fledge("tune", "state", words[-1], data, "--dry-run")
        assert ("template", "qa") in [tuple(line.split()) for line in again.text.splitlines()]
    if mode == "state":
        plain = ("-m", byte_model, "--adapter", tmp_path / "run" / "state.pth", "--max-tokens", 2)
        assert fledge("chat", *plain, stdin=talk).messages.startswith("User: hi\n")


def test_texts_alone_have_no_template(fledge: Any, byte_model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "tweet"}\n')
    fledge("tune", "state", byte_model, tmp_path / "texts.jsonl", "--to", tmp_path / "run", "--steps", 1)
    adapter = read_adapter(tmp_path / "run" / "state.safetensors")
    assert adapter.template is None and adapter.training["steps"] == 1 and "lora" not in adapter.training


def test_info_shows_the_metadata_of_every_adapter_type(
    fledge: Any, byte_model: Path, data: Path, tmp_path: Path
) -> None:
    identity = describe_base(read(byte_model)).identity
    for mode in ("full", "lora", "state"):
        fledge("tune", mode, byte_model, data, "--to", tmp_path / mode, "--steps", 1, "--template", "qa")
    ours = tmp_path / "lora" / "adapter.safetensors"
    fledge("tune", "convert", ours, tmp_path / "lora.pth")
    rows = {
        path: dict(line.split(maxsplit=1) for line in fledge("info", path).text.splitlines())
        for path in (
            *(ours, tmp_path / "lora.pth", tmp_path / "full" / "model.safetensors"),
            *(tmp_path / "state" / name for name in ("state.safetensors", "state.pth")),
        )
    }
    lora, theirs, full, state, plain = rows.values()
    assert [one["kind"] for one in rows.values()] == ["LoRA", "LoRA", "all weights tuned", *["tuned state"] * 2]
    assert [one["template"] for one in rows.values()] == ["qa", "not recorded", "qa", "qa", "not recorded"]
    assert identity in lora["base"] and identity in state["base"] and identity in full["tuned"]
    assert theirs["base"] == plain["base"] == "not recorded" and "--alpha" in theirs["alpha"] and lora["alpha"] == "32"
    assert lora["rank"] == theirs["rank"] == "16" and not {"rank", "alpha", "lora"} & {*state, *plain, *full}
    assert (full["steps"], full["epochs"], full["rate"], lora["final"]) == ("1", "1", "1e-05", "rate    2e-05")
    assert state["state"] == plain["state"] == "2 layers, 2 heads of 8 x 8"
    assert state["parameters"] == plain["parameters"] == "256 in 1,024 bytes"
    record = json.loads(fledge("info", tmp_path / "state" / "state.pth", "--json").text)
    assert (record["kind"], record["rank"], record["state"], record["template"]) == ("state", None, [2, 2, 8, 8], None)


def test_removed_blank_lines_are_reported(fledge: Any, byte_model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c\n\n\nd"}]
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"text": "x"}}\n{json.dumps({"messages": talk})}\n')
    text = fledge("tune", "lora", byte_model, data, "--dry-run").text
    assert "blank lines  removed from 2 messages" in text and "line 2\n" in text and "⟦ c\nd\n\n⟧" in text


def test_alpha_and_any_base_need_an_adapter(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    fledge("tune", "state", byte_model, data, "--to", tmp_path / "run", "--steps", 1)
    state, model = tmp_path / "run" / "state.safetensors", ("hi", "-m", byte_model)
    fledge("generate", *model, "--alpha", 32).check_error(2, "--alpha needs an adapter", "--adapter FILE")
    fledge("generate", *model, "--any-base").check_error(2, "--any-base needs an adapter")
    words = ("--alpha needs a LoRA", "state.safetensors is a tuned state")
    fledge("generate", *model, "--alpha", 32, "--adapter", state).check_error(2, *words)
    fledge("tune", "convert", state, tmp_path / "s.pth", "--alpha", 32).check_error(2, *words)
    fledge("tune", "convert", state, state).check_error(1, "exists; to replace it give --force")


def test_the_summary_of_a_full_run(fledge: Any, byte_model: Path, data: Path, tmp_path: Path) -> None:
    fledge("tune", "full", byte_model, data, "--to", tmp_path / "run", "--steps", 2)
    extra = read(tmp_path / "run" / "model.safetensors").extra["tuned"]
    assert extra["mode"] == "full" and extra["steps"] == 2 and len(extra["from"]) == 64
    assert "tuned" in fledge("info", tmp_path / "run" / "model.safetensors").text
