"""The optional parts of an installation."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation: `pip install "fledge[name]"`."""

    name: str
    modules: tuple[str, ...]
    purpose: str

    @property
    def command(self) -> str:
        """The command that installs it, or "" if nothing is missing."""
        return f'pip install "fledge[{self.name}]"' if self.missing else ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules that are not installed."""
        return tuple(module for module in self.modules if find_spec(module) is None)


EXTRAS = (
    Extra("hub", ("huggingface_hub",), "models by name from the Hugging Face hub"),
    Extra("bench", ("rwkv", "tokenizers", "matplotlib"), "`fledge bench`: baselines and plots"),
    Extra("gguf", ("gguf",), "writing .gguf files, and reading .gguf files with K-quants"),
    Extra("train", ("matplotlib", "tensorboard"), "plots of training runs, and TensorBoard"),
    Extra(
        "data",
        ("rensa", "py3langid", "pyarrow", "zstandard"),
        "near-duplicate removal, language detection, Parquet and .zst in `fledge data`",
    ),
    Extra(
        "serve",
        ("fastapi", "uvicorn", "llguidance", "prometheus_client"),
        "`fledge serve`, and structured output",
    ),
    Extra("ray", ("ray",), "`fledge data build --ray` and `fledge serve --replicas` on many machines"),
)
