"""Figures for Prometheus: what was asked, how fast it was answered, and what the engine and its cache hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from fledge.server.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServerMetrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        registry = self._registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter("fledge_requests", "Requests answered", labels, registry=registry)
        self.first = Histogram(
            "fledge_first_token_seconds",
            "From a request to its first piece of text",
            buckets=SECONDS,
            registry=registry,
        )
        self.gap = Histogram(
            "fledge_token_gap_seconds", "Time a token of an answer takes, on average", buckets=GAPS, registry=registry
        )
        registry.register(_Engine(service))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """Reads the engine's own tally when asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Called by the library."""
        engine, service = self._service.desk.engine, self._service
        tally = engine.stats
        counts = {
            "fledge_tokens_read": (tally.prefill_tokens, "Tokens of prompts read"),
            "fledge_tokens_cached": (tally.cached_tokens, "Tokens of prompts that the cache spared"),
            "fledge_tokens_drawn": (tally.sampled_tokens, "Tokens written"),
            "fledge_calls": (tally.model_calls, "Calls of the model"),
            "fledge_model_seconds": (tally.model_seconds, "Seconds in the model"),
        }
        gauges = {
            "fledge_batch": (tally.batch_size, "Sequences in the last call"),
            "fledge_waiting": (engine.num_waiting, "Requests of which nothing has been read"),
            "fledge_running": (engine.num_running, "Sequences being read or written"),
        }
        if service.cache is not None:
            stats = service.cache.stats
            counts["fledge_cache_hits"] = (stats.hits, "Prompts with a known beginning")
            counts["fledge_cache_misses"] = (stats.misses, "Prompts without one")
            gauges["fledge_cache_snapshots"] = (stats.snapshots, "States in memory")
            gauges["fledge_cache_bytes"] = (stats.bytes, "Bytes of the cache in memory")
            gauges["fledge_cache_disk_snapshots"] = (stats.disk_snapshots, "States on disk")
            gauges["fledge_cache_disk_bytes"] = (stats.disk_bytes, "Bytes of the cache on disk")
        if service.shelf is not None:
            totals = service.shelf.totals()
            gauges["fledge_states"] = (totals.states, "States kept")
            gauges["fledge_states_bytes"] = (totals.nbytes, "Bytes of the states kept")
        for name, (value, text) in counts.items():
            yield CounterMetricFamily(name, text, value=value)
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
