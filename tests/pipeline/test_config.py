"""What a configuration takes, what it refuses, and in which words."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import Config, every_option, format_of, make_config, read_yaml
from pipeline.errors import ConfigError

NAMES = {"source": "scene.tif", "output": "scene_x4.tif"}


def config(**options: Any) -> Config:
    return make_config(**{**NAMES, **options})


def test_two_names_are_enough() -> None:
    assert (config().scale, config().model.weights, config().format) == (4, "tiny", "cog")
    assert config().folder == Path("scene_x4.tif.run")


def test_it_does_not_change() -> None:
    with pytest.raises(ValidationError):
        config().scale = 2  # type: ignore[misc]


def test_names_may_be_paths() -> None:
    made = make_config(source=Path("a.tif"), output=Path("b.tif"), model={"weights": Path("c.safetensors")})
    assert (made.source, made.output, made.model.weights) == ("a.tif", "b.tif", "c.safetensors")


@pytest.mark.parametrize(
    ("given", "bands"),
    [
        pytest.param([4, 3, 2], (4, 3, 2), id="list"),
        pytest.param("4,3,2", (4, 3, 2), id="text"),
        pytest.param("4, 3", (4, 3), id="text-with-spaces"),
        pytest.param("2", (2,), id="one-as-text"),
        pytest.param(2, (2,), id="one"),
        pytest.param(None, None, id="all"),
    ],
)
def test_bands(given: Any, bands: tuple[int, ...] | None) -> None:
    assert config(bands=given).bands == bands


@pytest.mark.parametrize(
    ("given", "stretch"),
    [
        pytest.param("auto", "auto", id="auto"),
        pytest.param("type", "type", id="type"),
        pytest.param("-10,3000.5", (-10.0, 3000.5), id="text"),
        pytest.param([0, 1], (0.0, 1.0), id="list"),
    ],
)
def test_stretch(given: Any, stretch: Any) -> None:
    assert config(radiometry={"stretch": given}).radiometry.stretch == stretch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"scale": 9}, "scale: must be less than or equal to 8, not 9", id="too-large"),
        pytest.param({"scale": "four"}, "scale: must be a whole number, not 'four'", id="no-number"),
        pytest.param({"scale": 2.5}, "scale: must be a whole number, not 2.5", id="not-whole"),
        pytest.param({"source": ""}, "source: must not be empty", id="empty-name"),
        pytest.param({"bands": "4,x"}, "bands: must be a whole number, not 'x'", id="band-without-number"),
        pytest.param({"bands": [0]}, "bands=[0] must be different numbers, the first band being 1", id="band-0"),
        pytest.param({"bands": [1, 1]}, "bands=[1, 1] must be different numbers", id="band-twice"),
        pytest.param({"bands": []}, "bands=[] must be", id="no-bands"),
        pytest.param({"modle": {}}, "modle: there is no such option; did you mean model?", id="misspelt-section"),
        pytest.param({"steps": 4}, "steps: there is no such option; did you mean sampling.steps?", id="not-nested"),
        pytest.param({"sampling": {"stpes": 4}}, "did you mean sampling.steps?", id="misspelt-option"),
        pytest.param({"sampling": {"cfw": float("nan")}}, "sampling.cfw: must be a finite number", id="nan"),
        pytest.param({"run": {"memory": float("inf")}}, "run.memory: must be a finite number", id="infinite"),
        pytest.param({"run": {"memory": 0}}, "run.memory: must be greater than 0", id="no-memory"),
        pytest.param({"model": "tiny"}, "model: must be a mapping of options, not 'tiny'", id="section-of-text"),
        pytest.param({"model": {"device": "gpu"}}, "model.device: must be auto, cpu, cuda or cuda:N", id="device"),
        pytest.param(
            {"file": {"format": "png"}}, "file.format: must be 'cog', 'bigtiff', 'ome-tiff' or 'ome-zarr'", id="choice"
        ),
        pytest.param(
            {"radiometry": {"stretch": "5"}},
            "radiometry.stretch: must be auto, type, or two numbers as in 0,3000; not '5'",
            id="half-a-stretch",
        ),
        pytest.param(
            {"radiometry": {"stretch": [3, 1]}}, "radiometry.stretch: must rise from black to white", id="falling"
        ),
        pytest.param({"radiometry": {"percentiles": "2,101"}}, "must rise, within 0 and 100", id="percentiles"),
        pytest.param({"grid": {"block": 100}}, "block=100 must be a power of two", id="block"),
        pytest.param(
            {"file": {"compression": "deflate", "level": 12}}, "level=12 of compression=deflate must be at most 9",
            id="level",
        ),
        pytest.param({"file": {"compression": "lzw", "level": 1}}, "compression=lzw has no levels", id="no-levels"),
        pytest.param({"run": {"workers": "local", "address": "auto"}}, "but workers=local", id="address-of-nothing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(scale=0)
    assert str(caught.value).splitlines() == [
        "source: must be given",
        "output: must be given",
        "scale: must be greater than or equal to 1, not 0",
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.tif", "cog"),
        ("a.TIFF", "cog"),
        ("a.ome.tif", "ome-tiff"),
        ("a.OME.TIFF", "ome-tiff"),
        ("a.btf", "bigtiff"),
        ("a.zarr", "ome-zarr"),
        ("a.ome.zarr/", "ome-zarr"),
    ],
)
def test_a_name_tells_the_format(name: str, kind: str) -> None:
    assert format_of(name) == kind


def test_a_name_that_does_not_tell_is_refused_unless_the_format_is_given() -> None:
    with pytest.raises(ConfigError, match="'scene' does not tell its format\nhint: end it in .*--format"):
        config(output="scene").format  # noqa: B018  # raises
    assert config(output="scene", file={"format": "cog"}).format == "cog"


def test_the_folder_of_a_run_is_beside_the_output_even_if_that_is_a_folder() -> None:
    assert config(output="out/scene.zarr/").folder == Path("out/scene.zarr.run")
    assert config(run={"folder": "/scratch/run"}).folder == Path("/scratch/run")


def test_what_makes_pixels_is_all_but_names_and_the_way_the_work_is_done() -> None:
    told = {f"{section}.{name}" for section, options in config().what_makes_pixels.items() if isinstance(options, dict)
            for name in options} | {"scale", "bands"}  # fmt: skip
    silent = {path for path, _ in every_option()} - told
    assert {path for path in silent if not path.startswith("run.")} == {
        "source",  # known by its contents
        "output",
        "model.weights",  # known by their hash
        "model.device",
        "file.overwrite",
    }


def test_every_option_says_what_it_is() -> None:
    assert [path for path, field in every_option() if not field.description] == []


# ---- YAML ------------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_is_nested_as_the_configuration_is(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        source: scene.tif
        output: scene_x2.tif
        scale: 2
        bands: [4, 3, 2]
        model:            # all of it left out
        sampling: {steps: 20, negative_prompt: blurry}
        radiometry: {stretch: [0, 3000]}
        """,
    )
    made = make_config(**read_yaml(path))
    assert (made.scale, made.bands, made.sampling.steps, made.radiometry.stretch) == (2, (4, 3, 2), 20, (0.0, 3000.0))
    assert made.model == Config(**NAMES).model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("- a\n- b", "must be a mapping of options", id="list"),
        pytest.param("", "must be a mapping of options", id="empty"),
        pytest.param("1: 2", "must be a mapping of options", id="numbers-as-names"),
        pytest.param("scale: [4", "is not YAML", id="unclosed"),
        pytest.param("!!python/object/apply:os.getcwd []", "is not YAML", id="code"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path, text))


def test_yaml_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=os.strerror(2)):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_yaml(tmp_path / "picture.yaml")
