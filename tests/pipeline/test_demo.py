"""The demo: what it starts from, what it leaves behind, and what it says of it."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine
from typer.testing import CliRunner

from pipeline import cli, demo
from pipeline.config import Config
from pipeline.errors import ConfigError, OutputError
from pipeline.events import Event, Listener, Notice
from pipeline.signals import NEVER, Stopping


def repeating(config: Config, listener: Listener, stopping: Stopping) -> Path:
    """A stand-in for the run: every pixel `scale` times."""
    picture = read(Path(config.source)).repeat(config.scale, axis=1).repeat(config.scale, axis=2)
    demo.write_source(Path(config.output), picture)
    listener(Notice("done"))
    return Path(config.output)


def read(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the comparison is a picture, not a raster
        with rasterio.open(path) as raster:
            return raster.read()


def ignore(event: Event) -> None:
    pass


def test_the_photograph_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", None)
    picture = demo.photograph()
    assert (picture.shape, picture.dtype) == ((3, 128, 192), np.uint8)
    assert picture.std() > 20  # there is something to see


def test_without_scikit_image_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)  # type: ignore[arg-type]  # as if it were not there
    with pytest.raises(ConfigError, match=r"pip install 'gigasr\[demo\]'"):
        demo.make_demo(tmp_path / "demo", ignore)
    assert list(tmp_path.iterdir()) == []


def test_the_source_has_a_place(tmp_path: Path) -> None:
    demo.write_source(tmp_path / "a.tif", demo.photograph())
    with rasterio.open(tmp_path / "a.tif") as raster:
        assert raster.crs.to_epsg() == 32633
        assert raster.transform == Affine(10, 0, 500_000, 0, -10, 5_400_000)
        assert [band.name for band in raster.colorinterp] == ["red", "green", "blue"]


def test_the_comparison_has_bicubic_on_the_left_and_the_result_on_the_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "run", repeating)
    made = demo.make_demo(tmp_path / "demo", ignore, NEVER)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "photograph.tif",
        "photograph_x4.tif",
        "side_by_side.png",
    ]
    picture, source, output = read(made.comparison), read(made.source), read(made.output)
    assert picture.shape == (3, 512, 2 * 768 + demo.DIVIDER)
    left, divider, right = np.split(picture, [768, 768 + demo.DIVIDER], axis=2)
    assert (divider == 255).all()
    np.testing.assert_array_equal(right, output)
    # enlarged smoothly: within a pixel of the source, its own mean on the whole
    means = left.reshape(3, 128, 4, 192, 4).mean(axis=(2, 4))
    assert np.abs(means - source).mean() < 3
    assert (np.diff(left[:, :, 2:6].astype(int), axis=2) != 0).any()


def test_it_can_be_repeated_and_goes_on_with_the_same_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(demo, "run", lambda config, *others: seen.append(config) or repeating(config, *others))
    demo.make_demo(tmp_path, ignore)
    written_at = (tmp_path / "photograph.tif").stat().st_mtime_ns
    demo.make_demo(tmp_path, ignore)
    assert (tmp_path / "photograph.tif").stat().st_mtime_ns == written_at
    assert seen[0] == seen[1]
    assert (seen[0].file.overwrite, seen[0].model.weights, seen[0].model.device) == (True, "tiny", "cpu")


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write the demo to"):
        demo.make_demo(tmp_path / "file" / "demo", ignore)


@pytest.mark.parametrize("untrained", [False, True])
def test_it_says_plainly_when_the_weights_are_untrained(
    untrained: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "run", repeating)
    monkeypatch.setattr(demo, "is_untrained", lambda weights: untrained)
    done = CliRunner().invoke(cli.app, ["demo", str(tmp_path)])
    assert done.exit_code == 0
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "source",
        "4 times larger",
        "side by side",
        *(["please note"] if untrained else []),
    ]
    assert ("not trained" in done.stdout) == untrained
    assert done.stderr == "done\n"


def test_the_demo_for_real(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["demo", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photograph.tif",
        "photograph_x4.tif",
        "side_by_side.png",
    ]
    with rasterio.open(tmp_path / "photograph.tif") as source, rasterio.open(tmp_path / "photograph_x4.tif") as output:
        assert output.shape == (512, 768)
        assert output.crs == source.crs
        assert output.transform == source.transform @ Affine.scale(1 / 4)
        assert output.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        # whatever the network has learned, the colours are those of the source
        np.testing.assert_allclose(output.read().mean(axis=(1, 2)), source.read().mean(axis=(1, 2)), atol=4)
