"""The figures of a run as Prometheus would see them."""

import gc
import re
import time
import urllib.request
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.events import Event, StepTaken
from pipeline.run import run
from pipeline.telemetry import FIGURES, Snapshot
from tests.pipeline.rasters import pattern, rehearsal, write_raster
from tests.test_grafana_dashboard import EXPRESSIONS, metrics_of

ray = pytest.importorskip("ray")

PATIENCE_S = 90.0
"""Ray reports every ten seconds, on a machine that may have other things to do."""


@pytest.fixture(autouse=True)
def no_ray_is_left() -> Iterator[None]:
    yield
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves pipes open
        gc.collect()


@pytest.fixture
def node() -> dict[str, object]:
    """One of a small Ray of our own, without a dashboard, as gigasr starts it."""
    ray.init(address="local", num_cpus=1, object_store_memory=2**27, include_dashboard=False, log_to_driver=False)
    return node_of_ray()


def node_of_ray() -> dict[str, object]:
    (node,) = ray.nodes()
    return dict(node)


def snapshot(done: int, tiles: int) -> Snapshot:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    stage = {"stage_total_units": 400, "stage_units_per_second": 2.5, "stage_left_seconds": 90.0}
    figures = {figure.name: 1.5 for figure in FIGURES if not figure.of_stage}
    return Snapshot(
        state="running",
        written_at=noon,
        started_at=noon,
        host="head",
        pid=1,
        stage="sample",
        stages={"encode": {**stage, "stage_done_units": 400}, "sample": {**stage, "stage_done_units": done}},
        figures={**figures, "predicted_tiles_total": tiles, "workers_lost_total": 0},
    )


def scraped(node: dict[str, object]) -> dict[str, list[tuple[str, float]]]:
    """What the node's metrics are: labels and values, by name."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, list[tuple[str, float]]] = {}
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except OSError:  # it is not up yet
        return {}
    for name, labels, value in re.findall(r"^(\w+)(\{.*\})? (\S+)$", text, flags=re.MULTILINE):
        found.setdefault(name, []).append((labels, float(value)))
    return found


def scraped_once_there(node: dict[str, object], wanted: set[str]) -> dict[str, list[tuple[str, float]]]:
    begun, found = time.monotonic(), scraped(node)
    while not wanted <= found.keys() and time.monotonic() - begun < PATIENCE_S:
        time.sleep(1.0)
        found = scraped(node)
    return found


def values(metrics: dict[str, list[tuple[str, float]]], name: str, *labels: str) -> list[float]:
    return [value for found, value in metrics.get(name, []) if all(label in found for label in labels)]


def test_every_figure_and_every_metric_of_the_dashboard_can_be_scraped(node: dict[str, object]) -> None:
    from pipeline.ray_metrics import RayMetrics

    metrics = RayMetrics("scene.tif.run")
    metrics.publish(snapshot(done=100, tiles=40))
    metrics.publish(snapshot(done=120, tiles=60))
    metrics.publish(snapshot(done=120, tiles=60))
    wanted = {name for name in set().union(*map(metrics_of, EXPRESSIONS)) if not re.search("_gpus_|_gram_", name)}
    wanted.remove("ray_gigasr_workers_lost_total")  # a counter that has counted nothing is not there
    found = scraped_once_there(node, wanted)
    assert wanted - found.keys() == set()
    run = 'run="scene.tif.run"'
    assert values(found, "ray_gigasr_stage_done_units", run, 'stage="sample"') == [120.0]
    assert values(found, "ray_gigasr_stage_done_units", run, 'stage="encode"') == [400.0]
    assert values(found, "ray_gigasr_stage_left_seconds", run, 'stage="sample"') == [90.0]
    assert values(found, "ray_gigasr_step_seconds", run) == [1.5]
    assert values(found, "ray_gigasr_predicted_tiles_total", run) == [60.0]
    assert values(found, "ray_gigasr_commit_seconds_total", run) == [1.5]
    assert values(found, "ray_gigasr_workers_lost_total") == []
    assert all('SessionName="' in labels for name in wanted for labels, _ in found[name])


def test_a_run_on_ray_publishes_its_figures(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "source.tif", pattern(1, 60, 60, "uint8"))
    options = {"workers": "ray", "memory": 0.5}
    config = rehearsal(source, tmp_path / "target.tif", sampling={"steps": 2}, run=options)
    seen: list[dict[str, list[tuple[str, float]]]] = []

    def look(event: Event) -> None:
        if isinstance(event, StepTaken) and not seen:
            seen.append(scraped_once_there(node_of_ray(), {"ray_gigasr_diffusion_step"}))

    run(config, look)
    (found,) = seen
    labels = f'run="{config.folder.absolute()}"'
    assert values(found, "ray_gigasr_diffusion_step", labels) == [1.0]
    assert values(found, "ray_gigasr_workers", labels) == [1.0]
    assert values(found, "ray_gigasr_starts_total", labels) == [1.0]
    assert values(found, "ray_gigasr_stage_total_units", labels, 'stage="sample"') == [32.0]  # 2 steps of 4 x 4 blocks
