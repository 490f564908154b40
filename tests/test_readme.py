"""The README's promises, kept: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stablesr
from stablesr import hub
from stablesr.checkpoint import __main__ as cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
"""Language and content. ```python is run as it stands; what cannot run on any machine is marked ```py."""


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    python = [content for language, content in BLOCKS if language == "python"]
    assert python
    code = compile("\n".join(python), "README.md", "exec")
    with pytest.warns(stablesr.UntrainedWeights):  # as the README says; once `tiny` is trained, it must say that
        exec(code, names)
    image, sharp = names["image"], names["sharp"]
    assert sharp.dtype == np.uint8
    assert sharp.shape == (4 * image.shape[0], 4 * image.shape[1], 3)
    # the colours are those of the source, whatever the network has learned
    np.testing.assert_allclose(sharp.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=4)


def test_the_python_that_needs_weights_or_a_gpu_is_python() -> None:
    for _, content in (block for block in BLOCKS if block[0] == "py"):
        compile(content, "README.md", "exec")


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    assert "test" in wanted
    assert wanted <= set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))


COMMANDS = [
    shlex.split(line, comments=True)
    for language, content in BLOCKS
    if language == "sh"
    for line in content.splitlines()
    if line.startswith("python -m stablesr")
]


def test_the_readme_shows_how_to_get_weights() -> None:
    assert [words[:4] for words in COMMANDS] == [
        ["python", "-m", "stablesr.checkpoint", "pull"],
        ["python", "-m", "stablesr.checkpoint", "convert"],
    ]


@pytest.mark.parametrize("command", [pytest.param(words[3:], id=words[3]) for words in COMMANDS])
def test_the_commands_of_the_readme_are_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "pull", lambda preset, **_: asked.append("pull") or [])
    monkeypatch.setattr(cli, "convert", lambda *_: asked.append("convert"))
    assert cli.main(command) == 0
    assert asked == command[:1]


def test_the_module_of_the_readme_can_be_run() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "stablesr.checkpoint", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "S-Lab License 1.0" in " ".join(shown.stdout.split())
    assert shown.stderr == ""


def test_the_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
