"""Metrics that an actor exports by `ray.util.metrics`, for Prometheus and the dashboard."""

from __future__ import annotations

from collections.abc import Mapping


def in_ray_actor() -> bool:
    """Whether this process is a Ray actor, and not a test that builds the class directly."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


class Gauges:
    """Gauges named ``pavlov_<name>``, tagged with run and actor; created on first use.

    Outside a Ray worker there is nothing to export to, and setting a value does nothing.
    """

    def __init__(self, run: str, actor: str) -> None:
        self._tags = {"run": run, "actor": actor}
        self._gauges: dict[str, object] = {}

    def set(self, values: Mapping[str, float | int | None]) -> None:
        """Set gauges; a slash in a name becomes an underscore, None is left out."""
        import ray

        if not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in values.items():
            if value is None:
                continue
            key = "pavlov_" + name.replace("/", "_")
            if key not in self._gauges:
                self._gauges[key] = Gauge(key, name, tag_keys=("run", "actor"))
            self._gauges[key].set(float(value), tags=self._tags)  # type: ignore[attr-defined]
