"""Metrics of a server, in Prometheus' text format."""

from __future__ import annotations

import os
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

SHARED_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of the environment that names the folder in which several processes add up their
metrics. prometheus_client reads it when it is imported."""

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
EXPLAIN_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Metrics of one server; the sums over its processes, if `SHARED_FOLDER` is set.

    Attributes:
        requests: requests by route and status.
        seconds: duration of requests to /predict.
        explain_seconds: duration of requests to /explain.
        images: images answered.
        batches: sizes of the model's batches, without those of explanations.
        in_flight: current requests to /predict and /explain.
        request_bytes: bytes of the requests that are being read or answered.
        waiting: images waiting for the model.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "threefold_requests", "Requests.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "threefold_predict_seconds",
            "Seconds per request to /predict.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.explain_seconds = Histogram(
            "threefold_explain_seconds",
            "Seconds per request to /explain.",
            buckets=EXPLAIN_BUCKETS,
            registry=registry,
        )
        self.images = Counter("threefold_images", "Images answered.", registry=registry)
        self.batches = Histogram(
            "threefold_batch_images",
            "Images per batch of the model.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "threefold_requests_in_flight",
            "Current requests to /predict and /explain.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.request_bytes = Gauge(
            "threefold_request_bytes",
            "Bytes of requests being read or answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.waiting = Gauge(
            "threefold_images_waiting",
            "Images waiting for the model.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        if SHARED_FOLDER in os.environ:
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format; `process_...` only of a single process."""
        return generate_latest(self._registry)
