"""What a replica counts, in Prometheus' terms, and the metrics of all replicas on one page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from serve.batcher import Batch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COSINES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 1.0)


class ModelMetrics:
    """Of one replica of a model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.tokens = Counter("embedlib_tokens", "Tokens computed.", registry=registry)
        self.sequences = Counter("embedlib_sequences", "Texts computed.", registry=registry)
        self.overloaded = Counter("embedlib_overloaded", "Calls turned away at a full queue.", registry=registry)
        self.queued_tokens = Gauge("embedlib_queued_tokens", "Tokens that wait.", registry=registry)
        self.batch_fill = Histogram(
            "embedlib_batch_fill", "Tokens of a batch by those it may have.", buckets=SHARES, registry=registry
        )
        self.padding_waste = Histogram(
            "embedlib_padding_waste",
            "Share of a batch that would be padding, computed by backends that pad.",
            buckets=SHARES,
            registry=registry,
        )
        self.queue_age = Histogram(
            "embedlib_queue_age_seconds", "Age of a batch's oldest text.", buckets=SECONDS, registry=registry
        )
        self.batch_seconds = Histogram(
            "embedlib_batch_seconds", "Time that the model takes.", buckets=SECONDS, registry=registry
        )
        self.latency = Histogram(
            "embedlib_latency_seconds", "From a call's arrival to its answer.", buckets=SECONDS, registry=registry
        )

    def on_batch(self, batch: "Batch", batch_tokens: int) -> None:
        """Count a batch of at most `batch_tokens`."""
        self.tokens.inc(batch.num_tokens)
        self.sequences.inc(batch.num_sequences)
        self.batch_fill.observe(min(1.0, batch.num_tokens / batch_tokens))
        self.padding_waste.observe(1 - batch.num_tokens / (batch.num_sequences * batch.longest))
        self.queue_age.observe(batch.waited_s)
        self.batch_seconds.observe(batch.seconds)

    def collect(self) -> list[Metric]:
        """All of them, as they stand."""
        return list(self.registry.collect())


class GatewayMetrics:
    """Of one replica of the HTTP ingress."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "embedlib_requests", "Requests answered.", ["path", "status", "client"], registry=registry
        )
        self.fallbacks = Counter(
            "embedlib_fallbacks", "Requests that another model answered.", ["model"], registry=registry
        )
        self.seconds = Histogram(
            "embedlib_request_seconds", "From a request to its answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self.drift_cosine = Histogram(
            "embedlib_drift_cosine",
            "Cosine of a sampled text's vectors by the compressed and by the full model.",
            buckets=COSINES,
            registry=registry,
        )
        self.drift_spearman = Gauge(
            "embedlib_drift_spearman",
            "Spearman correlation of the two models' similarities among the latest sampled texts.",
            registry=registry,
        )

    def collect(self) -> list[Metric]:
        """All of them, as they stand."""
        return list(self.registry.collect())


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def exposition(replicas: Mapping[str, Mapping[str, Sequence[Metric]]]) -> bytes:
    """The metrics of all replicas, by deployment and name, in Prometheus' text format; both are labels of a sample."""
    merged: dict[str, Metric] = {}
    for deployment, processes in replicas.items():
        for replica, metrics in processes.items():
            for metric in metrics:
                whole = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                labels = {"deployment": deployment, "replica": replica}
                whole.samples += [sample._replace(labels=sample.labels | labels) for sample in metric.samples]
    registry = CollectorRegistry()
    registry.register(_Collected(merged.values()))
    return generate_latest(registry)
