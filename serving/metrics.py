"""What the gateway counts, for Prometheus: docs/serve.md lists the names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from genrec.serving.batching import Batch, EngineWorker, Kind
from genrec.serving.prefix_cache import PrefixCache
from genrec.serving.speculation import Speculative

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUTES: dict[Kind, str] = {
    "recommend": "/v1/recommend",
    "generate": "/v1/describe",
    "understand": "/v1/chat/completions",
}  # that an engine call stands under


class _Prefixes(Collector):
    """What a `PrefixCache` counts itself."""

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes

    def collect(self) -> Iterator[Metric]:
        asked = CounterMetricFamily("genrec_prefix_cache", "Prompts extended or computed whole.", labels=["result"])
        asked.add_metric(["hit"], self._prefixes.hits)
        asked.add_metric(["miss"], self._prefixes.misses)
        yield asked
        yield GaugeMetricFamily("genrec_prefix_cache_bytes", "Keys and values kept.", self._prefixes.n_bytes)


class _Drafts(Collector):
    """What a `Speculative` engine counts itself."""

    def __init__(self, engine: Speculative) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counts = self._engine.speculation()
        if counts is None:
            return
        yield CounterMetricFamily("genrec_draft_tokens", "Tokens of texts proposed.", counts.draft_tokens)
        yield CounterMetricFamily(
            "genrec_accepted_draft_tokens", "Proposed tokens that the model accepted.", counts.accepted_tokens
        )


class Metrics:
    """One gateway's numbers, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor seconds, open files
        self.stage = Histogram(
            "genrec_stage_seconds",
            "Time in the queue and in the engine per request, and in total per route.",
            ["route", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.requests = Counter(
            "genrec_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.batch_size = Histogram(
            "genrec_batch_size", "Requests per engine call.", ["route"], buckets=SIZES, registry=self.registry
        )
        self.engine_failures = Counter(
            "genrec_engine_failures", "Engine calls that raised.", ["route"], registry=self.registry
        )
        self.fallbacks = Counter("genrec_fallbacks", "Lists by popularity.", ["reason"], registry=self.registry)
        self.refusals = Counter("genrec_refusals", "Requests not worked on.", ["reason"], registry=self.registry)
        self.auth_failures = Counter(
            "genrec_auth_failures", "Requests without a right key.", ["reason"], registry=self.registry
        )
        self.cancelled = Counter("genrec_cancelled", "Requests whose client left.", ["route"], registry=self.registry)
        self.events = Counter("genrec_events", "Events of users.", ["result"], registry=self.registry)
        self.store_errors = Counter(
            "genrec_store_errors", "User store calls that failed.", ["kind"], registry=self.registry
        )
        self.item_changes = Counter("genrec_item_changes", "Items sent.", ["result"], registry=self.registry)
        self.items = Gauge("genrec_items", "Items that requests are answered from.", registry=self.registry)
        self.queue = Gauge("genrec_queue_length", "Requests that wait for the engine.", registry=self.registry)
        self.ready = Gauge("genrec_ready", "1 if /readyz says yes.", registry=self.registry)

    def count_batch(self, batch: Batch) -> None:
        """Take in one engine call."""
        route = ROUTES[batch.kind]
        self.batch_size.labels(route).observe(batch.size)
        if batch.failed:
            self.engine_failures.labels(route).inc()
        for waited_s in batch.waited_s:
            self.stage.labels(route, "queue").observe(waited_s)
            self.stage.labels(route, "engine").observe(batch.engine_s)

    def watch(self, worker: EngineWorker) -> None:
        """Read the queue's length whenever the metrics are asked for."""
        self.queue.set_function(lambda: worker.waiting)

    def watch_prefixes(self, prefixes: PrefixCache) -> None:
        """Show what an engine's cache of prompts counts."""
        self.registry.register(_Prefixes(prefixes))

    def watch_drafts(self, engine: Speculative) -> None:
        """Show how much of what an engine drafts is accepted."""
        self.registry.register(_Drafts(engine))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
