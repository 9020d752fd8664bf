"""Data sets of the Hugging Face hub, streamed by the package `datasets`, shard by shard.

Nothing is downloaded whole. Here: that package, and one line for whatever goes wrong in it. Not here: what its records
mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fledge.core.errors import DataError, UsageError
from fledge.data.pipeline.config import SourceConfig


def shards(source: SourceConfig) -> int:
    """In how many parts the data set can be read."""
    data = _load(source)
    return int(getattr(data, "num_shards", 0) or getattr(data, "n_shards", 0) or 1)


def records(source: SourceConfig, shard: int, count: int) -> Iterator[Mapping[str, Any]]:
    """The records of one shard of `count`."""
    data = _load(source)
    try:
        yield from data.shard(num_shards=count, index=shard) if count > 1 else data
    except Exception as error:  # whatever the network, the package or a loader of somebody's raises
        raise _unreadable(source, error) from None


def _load(source: SourceConfig) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f'source {source.hub}: hub data sets need the package datasets; pip install "fledge[data]" datasets'
        ) from None
    try:
        return datasets.load_dataset(
            source.hub, source.subset or None, split=source.split, revision=source.revision or None, streaming=True
        )
    except Exception as error:
        raise _unreadable(source, error) from None


def _unreadable(source: SourceConfig, error: Exception) -> DataError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(
        f"source {source.hub} cannot be read from the hub: {reason:.300}; is this machine online, and does the data "
        "set ask for a login? What was read is kept: run the same command again"
    )
