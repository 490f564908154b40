"""The figures of a run as metrics of Ray, which every node of a cluster shows to Prometheus."""

from ray.util.metrics import Counter, Gauge

from pipeline.telemetry import FIGURES, Figure, Number, Snapshot

PREFIX = "gigasr_"
"""Ray puts `ray_` before it."""


class RayMetrics:
    """One metric for each figure, with the run, and where it has one the stage, as tags."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {f.name: Gauge(PREFIX + f.name, f.description, _tags_of(f)) for f in _of_kind("gauge")}
        self._counters = {f.name: Counter(PREFIX + f.name, f.description, _tags_of(f)) for f in _of_kind("counter")}
        self._counted: dict[str, Number] = {}

    def publish(self, snapshot: Snapshot) -> None:
        for figure in FIGURES:
            for stage, value in snapshot.values(figure):
                if figure.kind == "gauge":
                    self._gauges[figure.name].set(value, self._tags(stage))
                else:
                    self._count(figure.name, value)

    def _count(self, name: str, total: Number) -> None:
        more = total - self._counted.get(name, 0)
        if more > 0:  # or Ray complains
            self._counters[name].inc(more, self._tags(None))
            self._counted[name] = total

    def _tags(self, stage: str | None) -> dict[str, str]:
        return {"run": self._run} | ({} if stage is None else {"stage": stage})


def _of_kind(kind: str) -> list[Figure]:
    return [figure for figure in FIGURES if figure.kind == kind]


def _tags_of(figure: Figure) -> tuple[str, ...]:
    return ("run", "stage") if figure.of_stage else ("run",)
