"""The recipe of the bundled model: a small Finch with a pruned World vocabulary, trained from scratch on a CPU.

    python recipes/tiny_finch.py prepare --corpus FOLDER --run runs/tiny-finch
    python recipes/tiny_finch.py train    --run runs/tiny-finch
    python recipes/tiny_finch.py evaluate --run runs/tiny-finch
    python recipes/tiny_finch.py plot     --run runs/tiny-finch --to docs/models/tiny-finch-loss.png
    python recipes/tiny_finch.py export   --run runs/tiny-finch --to fledge/assets/tiny-finch.safetensors

FOLDER holds .jsonl or .jsonl.xz files with {"text", "lang", "src"} a line. `train` can be interrupted and started
again; it goes on from its last checkpoint with the same data order.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fledge.checkpoint import save
from fledge.core.errors import UsageError
from fledge.core.files import atomic_path, sha256
from fledge.data.documents import Document, read_jsonl
from fledge.data.mixture import Mixture, select
from fledge.data.tokens import Windows, open_tokens, write_tokens
from fledge.models import ModelConfig, Trunk, build, init_weights
from fledge.tokenizer import Tokenizer, Vocabulary, load_world, prune, tokenizer_for, world_vocabulary
from fledge.train.loop import TrainSettings, train
from fledge.train.memory import keep_freed_memory
from fledge.train.schedule import Schedule
from fledge.train.score import bits_per_byte, document_nats

VOCAB_SIZE = 8192
SEED = 1

MODEL = ModelConfig.finch(n_layer=6, n_embd=192, vocab_size=VOCAB_SIZE)
BATCH, LENGTH, ACCUMULATE = 8, 512, 2  # 8192 tokens a step; micro-batches of this size stay near the caches
SETTINGS = TrainSettings(
    schedule=Schedule(peak=2e-3, final=1e-4, warmup=60, steps=1350),
    accumulate=ACCUMULATE,
    compute_dtype=torch.bfloat16,
    log_every=5,
    save_every=25,
    validate_every=90,
)
QUICK_BYTES = 6_000  # a language; what the validations during training read

# Mostly English, so that so small a model says something; seven more languages and Python, so that it stays a World
# model in miniature. Caps in bytes of text.
MIXTURE = Mixture(
    language_bytes={
        "en": 34_000_000,
        "de": 3_000_000,
        "fr": 3_000_000,
        "es": 3_000_000,
        "it": 2_000_000,
        "pt": 2_000_000,
        "ru": 3_000_000,
        "zh": 2_000_000,
        "ja": 2_000_000,
        "code:python": 5_000_000,
    },
    source_bytes={
        "chat/schema-guided-dialogue": 4_000_000,
        "reference/dict": 2_500_000,
        "reference/factbook": 1_500_000,
        "reference/quran-json": 300_000,
        "reference/udhr": 100_000,
        "debian/libreoffice-help": 600_000,
        "debian/manpages": 600_000,
        "debian/debian-docs": 700_000,
        "courses/azd": 300_000,
        "courses/edgeai": 300_000,
        "courses/iot": 600_000,
        "code/stdlibs": 3_500_000,
    },
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console()
RunFolder = Annotated[Path, typer.Option(help="folder of this run: token stores, checkpoints, metrics")]


@app.callback()
def recipe() -> None:
    """The recipe of the bundled model."""


@app.command()
def prepare(corpus: Annotated[Path, typer.Option(help="folder of .jsonl[.xz] files")], run: RunFolder) -> None:
    """Choose documents, prune the vocabulary to what they use most, write the token stores."""
    documents = [d for path in sorted(corpus.glob("*.jsonl*")) for d in read_jsonl(path)]
    selection = select(documents, MIXTURE)
    console.print(f"{len(selection.train)} documents to train on, {len(selection.validation)} aside")
    with multiprocessing.Pool() as pool:
        counts: Counter[int] = Counter()
        for part in pool.imap_unordered(_count_tokens, selection.train, chunksize=64):
            counts.update(part)
        vocabulary = _most_used(counts)
        _write_json(run / "vocabulary.json", vocabulary.to_spec())
        encode = _Encoder(vocabulary)
        total = write_tokens(run / "train.tokens", pool.imap(encode, selection.train, chunksize=64))
        write_tokens(run / "validation.tokens", pool.imap(encode, selection.validation, chunksize=8))
        sizes = pool.map(encode, selection.validation, chunksize=8)
    spans = [
        {"language": d.language, "source": d.source, "tokens": len(ids) + 1, "bytes": len(d.text.encode())}
        for d, ids in zip(selection.validation, sizes, strict=True)
    ]
    _write_json(run / "validation.json", spans)
    manifest = {
        "train_tokens": total,
        "train_bytes": _bytes_by(selection.train, "language"),
        "train_bytes_by_source": _bytes_by(selection.train, "source"),
        "validation_bytes": _bytes_by(selection.validation, "language"),
        "vocab_size": vocabulary.size,
    }
    _write_json(run / "manifest.json", manifest)
    console.print(manifest)


@app.command(name="train")
def train_model(run: RunFolder) -> None:
    """Train, or go on training, until the schedule ends."""
    keep_freed_memory()
    model = build(MODEL)
    init_weights(model, SEED)
    windows = Windows(open_tokens(run / "train.tokens"), LENGTH, BATCH, SEED)
    documents = _validation_documents(run)

    def validate(current: Trunk) -> dict[str, float]:
        return {f"bpb_{name}": value for name, value in _score(current, documents, QUICK_BYTES).items()}

    train(model, windows, SETTINGS, run, validate, _print_line)


def _print_line(line: dict[str, float]) -> None:
    console.print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), highlight=False)


@app.command()
def evaluate(run: RunFolder) -> None:
    """Bits per byte by language on all validation documents; written to evaluation.json."""
    model, step = _trained(run)
    scores = _score(model, _validation_documents(run), None)
    _write_json(run / "evaluation.json", {"step": step, "bits_per_byte": scores})
    console.print(scores)


@app.command()
def plot(run: RunFolder, to: Annotated[Path, typer.Option(help="the PNG to write")]) -> None:
    """Loss and validation bits per byte against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    per_step = BATCH * LENGTH * ACCUMULATE / 1e6
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    losses = [(line["step"] * per_step, line["loss"]) for line in lines if "loss" in line]
    left.plot(*zip(*losses, strict=True), linewidth=1)
    left.set(xlabel="million tokens", ylabel="training loss (nats a token)", title="Training loss")
    scored = [line for line in lines if "bpb_mean" in line]
    for name in sorted(key for key in scored[-1] if key.startswith("bpb_")):
        points = [(line["step"] * per_step, line[name]) for line in scored]
        style = {"color": "black", "linewidth": 2.0} if name == "bpb_mean" else {"linewidth": 1.0}
        right.plot(*zip(*points, strict=True), label=name.removeprefix("bpb_"), **style)
    right.set(xlabel="million tokens", ylabel="bits per byte", title="Text it never saw, by language")
    right.legend(fontsize="small", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


@app.command()
def export(run: RunFolder, to: Annotated[Path, typer.Option(help="the .safetensors to write")]) -> None:
    """Write the model with its config, vocabulary and training facts; matrices in float16."""
    model, step = _trained(run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    if evaluation["step"] != step:
        raise UsageError(f"evaluation.json is of step {evaluation['step']}, the weights of step {step}; evaluate again")
    tensors = {
        name: tensor.half() if name.endswith(".weight") and tensor.dim() == 2 else tensor
        for name, tensor in model.state_dict().items()
    }
    extra = {
        "name": "tiny-finch",
        "licence": "Apache-2.0",
        "recipe": "recipes/tiny_finch.py",
        "train_tokens": step * BATCH * LENGTH * ACCUMULATE,
        "bits_per_byte": evaluation["bits_per_byte"],
    }
    spec = json.loads((run / "vocabulary.json").read_text())
    save(to, MODEL, tensors, tokenizer_spec=spec, extra=extra)
    console.print(f"{to}: {to.stat().st_size / 1e6:.1f} MB, sha256 {sha256(to)}")


def _trained(run: Path) -> tuple[Trunk, int]:
    """The model of the run's last checkpoint, and how many steps it has seen."""
    model = build(MODEL)
    saved = torch.load(run / "last.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(saved["model"])
    return model.eval(), saved["step"]


def _validation_documents(run: Path) -> list[tuple[dict[str, Any], list[int]]]:
    """What is known of each validation document, and its ids without the separator."""
    tokens = open_tokens(run / "validation.tokens")
    documents, start = [], 0
    for span in json.loads((run / "validation.json").read_text()):
        end = start + span["tokens"]
        documents.append((span, tokens[start : end - 1].tolist()))
        start = end
    return documents


def _score(model: Trunk, documents: list[tuple[dict[str, Any], list[int]]], limit: int | None) -> dict[str, float]:
    """Bits per byte by language; with `limit`, of about that many bytes a language only."""
    nats: defaultdict[str, float] = defaultdict(float)
    sizes: defaultdict[str, float] = defaultdict(float)
    for span, ids in documents:
        language, size = span["language"], float(span["bytes"])
        if limit is not None and ids:
            left = limit - sizes[language]
            if left <= 0:
                continue
            keep = min(len(ids), max(1, int(len(ids) * left / size)))
            ids, size = ids[:keep], size * keep / len(ids)
        nats[language] += document_nats(model, ids)
        sizes[language] += size
    scores = {language: bits_per_byte(nats[language], sizes[language]) for language in sorted(nats)}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def _count_tokens(document: Document) -> Counter[int]:
    return Counter(load_world().encode(document.text))


def _most_used(counts: Counter[int]) -> Vocabulary:
    """The 256 bytes and the most frequent World tokens, VOCAB_SIZE ids with the end of text."""
    longer = sorted((token for token in counts if token > 256), key=lambda token: (-counts[token], token))
    return prune(world_vocabulary(), longer[: VOCAB_SIZE - 257], size=VOCAB_SIZE)


class _Encoder:
    """A picklable document -> ids function for the pool's workers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.spec = vocabulary.to_spec()

    def __call__(self, document: Document) -> list[int]:
        key = self.spec["sha256"]
        if key not in _ENCODERS:
            _ENCODERS[key] = tokenizer_for(self.spec)
        return _ENCODERS[key].encode(document.text)


_ENCODERS: dict[str, Tokenizer] = {}  # one tokenizer a worker process


def _bytes_by(documents: Iterable[Document], attribute: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for document in documents:
        total[getattr(document, attribute)] += len(document.text.encode())
    return dict(total.most_common())


def _write_json(path: Path, value: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    app()
