"""Data sets of the Hugging Face hub, streamed shard by shard with the package `datasets`, without a full download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fledge.core.errors import DataError, UsageError
from fledge.data.pipeline.config import SourceConfig


def count_shards(source: SourceConfig) -> int:
    """The number of shards in which the data set can be read."""
    data = _load(source)
    return int(getattr(data, "num_shards", 0) or getattr(data, "n_shards", 0) or 1)


def read_records(source: SourceConfig, shard: int, count: int) -> Iterator[Mapping[str, Any]]:
    """The records of shard `shard` of `count`. Raises DataError if the data set cannot be read."""
    data = _load(source)
    try:
        yield from data.shard(num_shards=count, index=shard) if count > 1 else data
    except Exception as error:  # the network, the package and third-party loaders raise many types
        raise _make_read_error(source, error) from None


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
        raise _make_read_error(source, error) from None


def _make_read_error(source: SourceConfig, error: Exception) -> DataError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(
        f"source {source.hub} cannot be read from the hub: {reason:.300}; check that this machine is online and "
        "whether the data set needs a login. Finished parts are kept: run the same command again"
    )
