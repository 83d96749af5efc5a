"""What the server counts, for Prometheus.

accepted candidates of an agent = mara_candidates_accepted_total / mara_candidates_examined_total
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mara_deploy.serve.worker import Worker
from mara_runtime.answer import Generation

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_GAUGES: dict[str, tuple[str, Callable[[Worker], int]]] = {
    "mara_places": ("answers decoded at once at most", lambda worker: worker.places),
    "mara_places_in_use": ("answers that are being decoded", lambda worker: worker.places_in_use),
    "mara_queue": ("requests that wait for a place", lambda worker: worker.queued),
    "mara_kv_tokens": ("tokens whose KV entries the places hold", lambda worker: worker.cached_tokens),
}


class _Gauges(Collector):
    """What the workers hold, read when it is asked for."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        """One gauge per fact, labelled by bundle."""
        for name, (help_text, read) in _GAUGES.items():
            family = GaugeMetricFamily(name, help_text, labels=["bundle"])
            for worker in self._workers:
                family.add_metric([worker.name], read(worker))
            yield family


class Metrics:
    """Counters of one server. agent: of an answer; "mix" where several judge, "none" in plain decoding."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_Gauges(workers))
        by, judged = ["bundle"], ["bundle", "agent"]
        self.requests = Counter("mara_requests", "requests", ["endpoint", "status"], registry=registry)
        self._prompt = Counter("mara_prompt_tokens", "tokens of prompts", by, registry=registry)
        self._cached = Counter("mara_cached_tokens", "of them, found in a KV cache", by, registry=registry)
        self._tokens = Counter("mara_completion_tokens", "tokens of answers", judged, registry=registry)
        self._examined = Counter(
            "mara_candidates_examined", "candidates that agents were asked about", judged, registry=registry
        )
        self._accepted = Counter("mara_candidates_accepted", "candidates that they accepted", judged, registry=registry)
        self._forced = Counter(
            "mara_decisions_forced", "positions at which all candidates were rejected", judged, registry=registry
        )
        self._first = Histogram(
            "mara_first_token_seconds", "from a request to its first token", by, buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "mara_answer_seconds", "from a request to the end of its answer", by, buckets=_SECONDS, registry=registry
        )

    def first(self, worker: Worker, seconds: float) -> None:
        """Count a first token."""
        self._first.labels(worker.name).observe(seconds)

    def answered(self, worker: Worker, result: Generation, seconds: float) -> None:
        """Count an answer that is complete."""
        stats, agents = result.stats, [*(result.config.agents or ())] if result.config.align else []
        judged = worker.name, "none" if not agents else agents[0] if len(agents) == 1 else "mix"
        self._prompt.labels(worker.name).inc(stats.prompt_tokens)
        self._cached.labels(worker.name).inc(stats.reused_tokens)
        self._tokens.labels(*judged).inc(stats.tokens)
        self._examined.labels(*judged).inc(stats.examined)
        self._accepted.labels(*judged).inc(stats.accepted_rank.total())
        self._forced.labels(*judged).inc(stats.forced)
        self._whole.labels(worker.name).observe(seconds)

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
