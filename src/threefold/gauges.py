"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Gauges:
    """Counters of one server.

    Attributes:
        requests: by route and status.
        seconds: of requests to /predict.
        images: answered.
        batches: images that the model was given at once.
        in_flight: requests to /predict now.
        bytes_held: of requests that are being read or answered now.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "threefold_requests", "Requests.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "threefold_predict_seconds",
            "Seconds per request to /predict.",
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter("threefold_images", "Images answered.", registry=registry)
        self.batches = Histogram(
            "threefold_batch_images",
            "Images given to the model at once.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.in_flight = Gauge(
            "threefold_requests_in_flight", "Requests to /predict now.", registry=registry
        )
        self.bytes_held = Gauge(
            "threefold_bytes_held", "Bytes of requests being read or answered.", registry=registry
        )
        Gauge(
            "threefold_images_waiting", "Images waiting for the model.", registry=registry
        ).set_function(waiting)
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """All of them as text."""
        return generate_latest(self._registry)
