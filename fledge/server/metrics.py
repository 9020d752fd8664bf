"""Metrics for Prometheus: requests, latency, and the contents of the engine, its prefix cache and the state store."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fledge.engine.engine import Engine
from fledge.engine.states.shared_store import SharedStateStore
from fledge.engine.states.store import StateStore

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServerMetrics:
    """The metrics of one server, in their own registry."""

    def __init__(self, engine: Engine, state_store: StateStore | SharedStateStore | None) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("fledge_requests", "Requests answered", ("path", "status"), registry=registry)
        self.time_to_first_token = Histogram(
            "fledge_first_token_seconds",
            "Seconds from the start of a request to its first text",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "fledge_token_gap_seconds",
            "Mean seconds between the tokens of a completion",
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        registry.register(_EngineCollector(engine, state_store))

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the statistics of the engine, its prefix cache and the state store when they are requested."""

    def __init__(self, engine: Engine, state_store: StateStore | SharedStateStore | None) -> None:
        self._engine, self._state_store = engine, state_store

    def collect(self) -> Iterator[Metric]:
        """All metrics. Called by prometheus_client."""
        stats = self._engine.stats
        counters = {
            "fledge_prefill_tokens": (stats.prefill_tokens, "Prompt tokens computed"),
            "fledge_cached_tokens": (stats.cached_tokens, "Prompt tokens taken from the prefix cache"),
            "fledge_sampled_tokens": (stats.sampled_tokens, "Tokens sampled"),
            "fledge_calls": (stats.model_calls, "Calls of the model"),
            "fledge_model_seconds": (stats.model_seconds, "Seconds spent in the model"),
        }
        gauges = {
            "fledge_batch": (stats.batch_size, "Sequences in the last batch"),
            "fledge_waiting": (self._engine.num_waiting, "Requests that have not started"),
            "fledge_running": (self._engine.num_running, "Sequences being prefilled or decoded"),
        }
        if self._engine.cache is not None:
            cache = self._engine.cache.stats
            counters["fledge_cache_hits"] = (cache.hits, "Prompts with a cached prefix")
            counters["fledge_cache_misses"] = (cache.misses, "Prompts without a cached prefix")
            gauges["fledge_cache_snapshots"] = (cache.snapshots, "Snapshots in memory")
            gauges["fledge_cache_bytes"] = (cache.bytes, "Bytes of the prefix cache in memory")
            gauges["fledge_cache_disk_snapshots"] = (cache.disk_snapshots, "Snapshots on disk")
            gauges["fledge_cache_disk_bytes"] = (cache.disk_bytes, "Bytes of the prefix cache on disk")
        if self._state_store is not None:
            totals = self._state_store.totals()
            gauges["fledge_states"] = (totals.states, "Saved states")
            gauges["fledge_states_bytes"] = (totals.nbytes, "Bytes of saved states")
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
