"""The README's promises, kept: its commands and its Python run as they stand, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

import stablesr
from stablesr import hub
from tests.pipeline.rasters import pattern, write_raster

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
"""Language and content."""

COMMANDS = [
    shlex.split(line, comments=True)
    for language, content in BLOCKS
    if language == "sh"
    for line in content.splitlines()
]

OF_THE_NETWORK = [words for words in COMMANDS if words[:2] == ["gigasr", "models"] and words[2] != "list"]
"""They fetch gigabytes, or want them."""


@pytest.fixture
def clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing but a scene, and what pip installed on the path."""
    write_raster(tmp_path / "scene.tif", pattern(3, 40, 52, "uint8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_the_commands_of_the_readme_run_as_they_stand(clean_folder: Path) -> None:
    commands = [words for words in COMMANDS if words[0] == "gigasr" and words not in OF_THE_NETWORK]
    assert [words[1] for words in commands] == ["plan", "upscale", "status", "verify", "models"]
    for words in commands:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, (words, done.stderr)
        assert "Traceback" not in done.stderr
    with rasterio.open(clean_folder / "scene_x4.tif") as target:
        assert (target.height, target.width, target.count) == (160, 208, 3)
        assert target.crs.to_epsg() == 32633
        assert target.res == (2.5, 2.5)
        assert "StableSR" not in target.tags()
        assert target.tags()["GIGASR_SEED"] == "0"


def test_the_file_of_options_is_one(clean_folder: Path) -> None:
    (text,) = [content for language, content in BLOCKS if language == "yaml"]
    (clean_folder / "job.yaml").write_text(text)
    command = text.splitlines()[0].removeprefix("# job.yaml: ")
    assert command == "gigasr upscale --config job.yaml"
    subprocess.run(shlex.split(command), check=True, timeout=300, capture_output=True)
    with rasterio.open(clean_folder / "scene_x2.tif") as target:
        assert (target.height, target.width, target.count) == (80, 104, 3)
        assert target.profile["compress"] == "deflate"


def test_the_python_of_the_readme_runs_as_it_stands(clean_folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    python = [content for language, content in BLOCKS if language == "python"]
    assert len(python) == 2
    code = compile("\n".join(python), "README.md", "exec")
    with pytest.warns(stablesr.UntrainedWeights):  # as the README says; once `tiny` is trained, it must say that
        exec(code, names)
    with rasterio.open(clean_folder / "scene_python.tif") as target:
        assert (target.height, target.width) == (80, 104)
    image, sharp = names["image"], names["sharp"]
    assert sharp.dtype == np.uint8
    assert sharp.shape == (4 * image.shape[0], 4 * image.shape[1], 3)
    # the colours are those of the source, whatever the network has learned
    np.testing.assert_allclose(sharp.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=4)


def test_the_readme_starts_with_a_picture_and_two_commands() -> None:
    picture, commands = README.index("!["), README.index("```sh")
    assert picture < commands < README.index("\n## ")
    assert [words[0] for words in COMMANDS[:2]] == ["make", ".venv/bin/gigasr"]


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"`make ([a-z][a-z-]*)|^make ([a-z][a-z-]*)", README, flags=re.MULTILINE))
    targets = {name for pair in wanted for name in pair if name}
    assert {"test", "demo"} <= targets
    assert targets <= set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("words", [pytest.param(words, id=words[2]) for words in OF_THE_NETWORK])
def test_the_commands_that_need_the_network_are_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from pipeline.cli import app
    from stablesr import checkpoint

    asked = []
    monkeypatch.setattr(hub, "pull", lambda preset, **_: asked.append("pull") or [])
    monkeypatch.setattr(checkpoint, "convert", lambda *_: asked.append("convert"))
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert asked == [words[2]]


def test_the_readme_names_the_licence_of_the_weights() -> None:
    assert "S-Lab License 1.0: non-commercial" in README


def test_the_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert "docs/canvas.jpg" in links
    assert [link for link in links if not (ROOT / link).exists()] == []
