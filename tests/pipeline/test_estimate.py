"""How long a run will take: a number of seconds, which grows with the work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import estimate
from pipeline.errors import ConfigError
from pipeline.estimate import PIXELS_S, measure_flops, measure_seconds
from pipeline.plan import Plan, make_plan
from tests.pipeline.rasters import rehearsal, write_raster


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MEASURE_S", 0.05)


def planned(folder: Path, height: int, width: int, weights: str, **more: Any) -> Plan:
    source = write_raster(folder / f"{height}-{width}.tif", np.zeros((3, height, width), "uint8"))
    return make_plan(rehearsal(source, folder / "target.tif", model={"weights": weights, "device": "cpu"}, **more))


def test_repeating_pixels_costs_what_pixels_cost(tmp_path: Path) -> None:
    small, large = (planned(tmp_path, side, 200, "nearest", grid={"block": 256}) for side in (100, 400))
    assert measure_seconds(small) == pytest.approx(400 * 800 * 3 * PIXELS_S)
    assert measure_seconds(large) == pytest.approx(4 * measure_seconds(small))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_small_network_is_measured_itself(tmp_path: Path, micro: str, precision: str) -> None:
    plan = planned(tmp_path, 100, 200, micro)
    plan = plan.model_copy(
        update={"config": plan.config.model_copy(update={"model": plan.config.model.model_copy(
            update={"precision": precision})})}
    )  # fmt: skip
    assert 1e7 < measure_flops(plan) < 1e15
    assert measure_seconds(plan) > plan.total_flops / 1e15


def test_the_expected_time_grows_with_the_area_and_the_steps(
    tmp_path: Path, micro: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for measured in ("measure_flops", "measure_patch_flops"):
        monkeypatch.setattr(estimate, measured, lambda plan: 1e10)
    one = measure_seconds(planned(tmp_path, 100, 100, micro, sampling={"steps": 2, "patch": 16}))
    four = measure_seconds(planned(tmp_path, 200, 200, micro, sampling={"steps": 2, "patch": 16}))
    assert 3 < four / one < 6
    more_steps = measure_seconds(planned(tmp_path, 100, 100, micro, sampling={"steps": 4, "patch": 16}))
    assert one < more_steps < 2 * one


def test_a_large_network_is_judged_by_a_convolution(tmp_path: Path) -> None:
    """Nothing of the size of its weights is made."""
    assert 1e8 < measure_flops(planned(tmp_path, 50, 50, "sd21-512")) < 1e15


def test_a_device_that_is_not_there_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = planned(tmp_path, 50, 50, "sd21-512")
    model = plan.config.model.model_copy(update={"device": "cuda"})
    plan = plan.model_copy(update={"config": plan.config.model_copy(update={"model": model})})
    with pytest.raises(ConfigError, match="sees no GPU"):
        measure_seconds(plan)
