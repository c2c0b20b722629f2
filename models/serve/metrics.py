"""Metrics of the server for Prometheus."""

from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from monarchrt.models.serve.session import Observed
from monarchrt.models.serve.sessions import Sessions

BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)


class Metrics(Observed):
    """Counters and gauges in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU time and open files of this process; Linux only
        options: dict[str, Any] = dict(namespace="monarchrt", registry=self.registry)
        self._blocks = Histogram("block_seconds", "Seconds that a block took.", buckets=BUCKETS, **options)
        self._frames = Counter("frames", "Frames made.", **options)
        self._dropped = Counter("frames_dropped", "Frames dropped because clients were too slow.", **options)
        self._ended = Counter("sessions_ended", "Sessions that have ended.", ["reason"], **options)
        self._gauges = {
            "sessions_active": Gauge("sessions_active", "Sessions that have a place.", **options),
            "sessions_waiting": Gauge("sessions_waiting", "Sessions that wait for a place.", **options),
            "frames_waiting": Gauge("frames_waiting", "Frames that clients have not read yet.", **options),
        }
        self._memory = Gauge("device_memory_bytes", "Memory in use on a device.", ["device"], **options)

    def block(self, seconds: float, frames: int) -> None:
        """Counts a block that took `seconds`."""
        self._blocks.observe(seconds)
        self._frames.inc(frames)

    def dropped(self, frames: int) -> None:
        """Counts frames that were dropped."""
        self._dropped.inc(frames)

    def ended(self, reason: str) -> None:
        """Counts a session that has ended."""
        self._ended.labels(reason).inc()

    def text(self, sessions: Sessions) -> bytes:
        """All metrics in Prometheus's text format."""
        self._gauges["sessions_active"].set(sessions.active)
        self._gauges["sessions_waiting"].set(sessions.waiting)
        self._gauges["frames_waiting"].set(sessions.frames_waiting)
        for device in jax.local_devices():
            if stats := device.memory_stats():
                self._memory.labels(str(device.id)).set(stats.get("bytes_in_use", 0))
        return generate_latest(self.registry)
