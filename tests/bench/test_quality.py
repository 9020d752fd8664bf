"""Quality: the metrics compared with their definitions, in one window or many, by language, for formats and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import random_checkpoint

from fledge import checkpoint
from fledge.bench import quality
from fledge.bench.quality import QualityBenchmark
from fledge.bench.sparsity import count_sparsity
from fledge.bench.suite import run_benchmark
from fledge.checkpoint.quantization.quantizer import quantize
from fledge.core.errors import UsageError
from fledge.tokenizer import prune, world_vocabulary

DOCUMENTS = [("Ein Haus am See.", "de"), ("A house by the sea.", "en"), ("Zwei Boote.", "de")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an end-of-text id, one without, and a text."""
    folder = tmp_path_factory.mktemp("quality")
    vocabulary = prune(world_vocabulary(), range(300, 340))
    tensors = random_checkpoint("6.0", n_layer=2, n_embd=64, vocab_size=vocabulary.size)
    torch.save(tensors, folder / "plain.pth")
    config, tensors = checkpoint.load(folder / "plain.pth")
    checkpoint.save(folder / "world.safetensors", config, tensors, tokenizer_spec=vocabulary.to_spec())
    torch.save(random_checkpoint("5.2", n_layer=2, n_embd=64, vocab_size=256), folder / "bytes.pth")
    lines = [json.dumps({"text": text, "lang": language}) for text, language in DOCUMENTS]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "text.txt").write_text(DOCUMENTS[0][0])
    return folder


def metrics_of(record: dict[str, Any]) -> dict[str, Any]:
    """Format -> language -> metrics."""
    return {name: values["figures"] for name, values in record["formats"].items()}


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids[:-1]]))[0][0].double(), -1)


def test_the_metrics_match_their_definitions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "WINDOW", 5)  # shorter than the documents: the state is carried on
    settings = QualityBenchmark(folder / "text.jsonl", str(folder / "bytes.pth"), ("int4",))
    metrics = metrics_of(run_benchmark(settings))["int4"]["de"]
    config, tensors = checkpoint.load(folder / "bytes.pth")
    dense = checkpoint.assemble(config, tensors)
    rounded = checkpoint.assemble(config, tensors, quant="int4", pack=True, dtype=torch.float32)
    nats, kl, agreed, changes = 0.0, 0.0, 0, []
    ids = [list(text.encode()) for text, language in DOCUMENTS if language == "de"]  # no end-of-text id in this model
    for document in ids:
        p, q = log_probabilities(dense, document), log_probabilities(rounded, document)
        targets = torch.tensor(document[1:])[:, None]
        nats -= float(q.gather(1, targets).sum())
        changes += (p - q).gather(1, targets)[:, 0].tolist()
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    count = sum(len(document) - 1 for document in ids)
    assert metrics["tokens"] == metrics["bytes"] == count
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(nats / count / math.log(2), rel=1e-4)
    assert metrics["kl"] == pytest.approx(kl / count, rel=1e-2)
    assert metrics["agreement"] == pytest.approx(agreed / count, abs=1.5 / count)
    mean, spread = torch.tensor(changes).mean(), torch.tensor(changes).std(correction=0)
    assert metrics["perplexity_change"] == pytest.approx(math.expm1(mean), rel=1e-2)
    assert metrics["perplexity_change_error"] == pytest.approx(float(spread) / count**0.5, rel=1e-2)


def test_the_reference_is_itself_and_all_is_the_sum(folder: Path) -> None:
    record = run_benchmark(QualityBenchmark(folder / "text.jsonl", str(folder / "world.safetensors")))
    metrics = metrics_of(record)
    bits = {name: values["bits_per_weight"] for name, values in record["formats"].items()}
    assert list(metrics) == ["float32", "bf16", "int8", "int4", "mixed"]
    for by in metrics.values():
        assert list(by) == ["all", "de", "en"] and by["all"]["tokens"] == by["de"]["tokens"] + by["en"]["tokens"]
    assert metrics["float32"]["all"]["kl"] == 0 and metrics["float32"]["all"]["agreement"] == 1
    assert 0 < metrics["int8"]["all"]["kl"] < metrics["int4"]["all"]["kl"] / 10
    assert bits["float32"] == 32 and bits["bf16"] == 16
    assert bits["int4"] <= bits["mixed"] < bits["int8"]
    # With an end-of-text id even the first token is predicted.
    assert metrics["int8"]["all"]["bytes"] == sum(len(text.encode()) for text, _ in DOCUMENTS)


def test_the_same_twice(folder: Path) -> None:
    settings = QualityBenchmark(folder / "text.txt", str(folder / "bytes.pth"), ("int8",))
    one, other = (run_benchmark(settings, "command") for _ in range(2))
    one.pop("machine"), other.pop("machine")
    assert one == other and list(one["formats"]["int8"]["figures"]) == ["all"]
    assert one["model"]["n_embd"] == 64 and one["text"]["name"] == "text.txt"


def test_the_tokens_of_each_language_are_limited(folder: Path) -> None:
    calls: list[Any] = []
    settings = QualityBenchmark(folder / "text.jsonl", str(folder / "bytes.pth"), ("int8",), tokens=20)
    metrics = metrics_of(run_benchmark(settings, "", lambda *call: calls.append(call)))["int8"]
    assert metrics["de"]["tokens"] == 20 and metrics["en"]["tokens"] == len(DOCUMENTS[1][0]) - 1
    assert calls[-1][1:] == (20 + len(DOCUMENTS[1][0]) - 1,) * 2


def test_a_file_among_the_formats(folder: Path, tmp_path: Path) -> None:
    source = folder / "world.safetensors"
    quantize(source, tmp_path / "small.safetensors", "int4")
    formats = ("int4", str(tmp_path / "small.safetensors"))
    metrics = metrics_of(run_benchmark(QualityBenchmark(folder / "text.txt", str(source), formats)))
    assert metrics["small.safetensors"] == metrics["int4"]
    with pytest.raises(UsageError, match="is quantized; pass the checkpoint it was made from"):
        run_benchmark(QualityBenchmark(folder / "text.txt", str(tmp_path / "small.safetensors")))
    with pytest.raises(UsageError, match="is of another model"):
        run_benchmark(
            QualityBenchmark(folder / "text.txt", str(folder / "bytes.pth"), (str(tmp_path / "small.safetensors"),))
        )


def test_usage_errors(folder: Path, tmp_path: Path) -> None:
    text = folder / "text.txt"
    with pytest.raises(UsageError, match="format 'int3' is none of bf16, int8, int4, mixed, and there is no such file"):
        QualityBenchmark(text, formats=("int3",))
    with pytest.raises(UsageError, match="tokens is 0"):
        QualityBenchmark(text, tokens=0)
    (tmp_path / "bytes.pth").write_bytes(b"x")
    with pytest.raises(UsageError, match="have the same name"):
        QualityBenchmark(text, formats=(str(folder / "bytes.pth"), str(tmp_path / "bytes.pth")))
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(UsageError, match="at least two tokens"):
        run_benchmark(QualityBenchmark(tmp_path / "one.txt", str(folder / "bytes.pth"), ("int8",)))


def test_zeros_are_counted_one_by_one_and_in_pairs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint.read(folder / "bytes.pth")
    model: Any = checkpoint.assemble(source.config, source.tensors)
    ids, seen = list(b"a house by the sea"), []
    model.blocks[1].ffn.value.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    zero = seen[0] == 0
    monkeypatch.setattr("fledge.bench.sparsity.WINDOW", 7)
    layers = count_sparsity(source, [ids])
    assert [layer.layer for layer in layers] == [0, 1]
    assert layers[1].zero_share == pytest.approx(float(zero.float().mean()))
    assert layers[1].pair_share == pytest.approx(float((zero[:, ::2] & zero[:, 1::2]).float().mean()))
    record = run_benchmark(QualityBenchmark(folder / "text.txt", str(folder / "bytes.pth"), ("int8",), sparsity=True))
    assert 0.3 < record["sparsity"][0]["zero_share"] < 0.7 and record["sparsity"][0]["pair_share"] < 0.5
