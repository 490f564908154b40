"""The arrows between the packages, what they may lean on, and the public surface, as tests."""

import ast
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import stablesr

ROOT = Path(__file__).resolve().parents[1]

LAYERS = ("stablesr", "pipeline", "jobs")
"""Bottom first: each may import those before it."""

PRESENT = [layer for layer in LAYERS if (ROOT / layer).is_dir()]

DEPENDENCIES_OF_STABLESR = {"torch", "numpy", "safetensors"}


def modules_of(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported_packages(source: str) -> set[str]:
    """Top-level names of what is imported, wherever in a file the import stands; a relative import names none."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def imports_of(layer: str) -> dict[Path, set[str]]:
    return {path: imported_packages(path.read_text(encoding="utf-8")) for path in modules_of(layer)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("import os.path, torch.nn as nn", {"os", "torch"}, id="plain"),
        pytest.param("from numpy.typing import NDArray", {"numpy"}, id="from"),
        pytest.param("from .blocks import X\nfrom . import y", set(), id="relative"),
        pytest.param("def f():\n    if x:\n        import scipy", {"scipy"}, id="within-a-function"),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, expected: set[str]) -> None:
    assert imported_packages(source) == expected


def test_the_networks_are_there_and_lean_on_each_other_and_on_torch() -> None:
    # what keeps the tests below from passing on an empty or misplaced package
    assert "stablesr" in PRESENT
    assert Path(stablesr.__file__ or "").resolve().is_relative_to(ROOT / "stablesr")
    imports = imports_of("stablesr")
    assert len(imports) > 10
    assert {"torch", "numpy", "safetensors", "stablesr"} <= set().union(*imports.values())


@pytest.mark.parametrize("layer", PRESENT)
def test_a_layer_imports_no_layer_above_it(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    climbing = {path.name: sorted(names & above) for path, names in imports_of(layer).items() if names & above}
    assert climbing == {}


def test_the_networks_import_torch_numpy_safetensors_and_the_standard_library_only() -> None:
    allowed = DEPENDENCIES_OF_STABLESR | {"stablesr"} | sys.stdlib_module_names
    foreign = {path.name: sorted(names - allowed) for path, names in imports_of("stablesr").items() if names - allowed}
    assert foreign == {}


@pytest.mark.parametrize("layer", PRESENT)
def test_ray_stays_at_the_edge(layer: str) -> None:
    knowing = {path.relative_to(ROOT).as_posix() for path, names in imports_of(layer).items() if "ray" in names}
    allowed = {"pipeline/ray_workers.py", "pipeline/ray_metrics.py"} if layer == "pipeline" else set()
    assert {path for path in knowing if not path.startswith("jobs/")} == allowed


KNOWN_TO = {
    "zarr": {"store.py", "raster/ome_zarr.py", "raster/pages_source.py", "raster/validate.py"},
    "rasterio": {"demo.py", "raster/"},
    "tifffile": {"raster/"},
    "imagecodecs": {"raster/"},
    "typer": {"cli.py", "options.py"},
    "rich": {"cli.py", "progress.py"},
}
"""Which files of the pipeline may know a library; a folder stands for all in it."""


@pytest.mark.parametrize("library", KNOWN_TO)
def test_a_library_stays_in_its_place(library: str) -> None:
    folder = ROOT / "pipeline"
    knowing = {
        path.relative_to(folder).as_posix() for path, names in imports_of("pipeline").items() if library in names
    }
    assert knowing
    assert {path for path in knowing if not path.startswith(tuple(KNOWN_TO[library]))} == set()


def test_values_and_grids_of_the_pipeline_know_no_pixels() -> None:
    imports = {path.name: names for path, names in imports_of("pipeline").items()}
    for name in ("grid.py", "events.py", "errors.py", "config.py"):
        assert imports[name] & {"torch", "numpy", "zarr", "rasterio", "ray"} == set()


def test_the_map_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)`", text))
    modules = {path.stem for layer in PRESENT for path in modules_of(layer) if not path.stem.startswith("__")}
    assert modules - named == set()


BARE_MACHINE = """
import pkgutil, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

OURS = {"stablesr", "torch", "numpy", "safetensors"}
OF_TORCH = {"filelock", "fsspec", "functorch", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy",
            "torchgen", "typing_extensions"}
ALLOWED = OURS | OF_TORCH | sys.stdlib_module_names

class BareMachine:
    '''Finds what a machine with nothing but stablesr's own dependencies has.'''

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.partition(".")[0] in ALLOWED else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, BareMachine]
try:
    import pytest
except ModuleNotFoundError:
    print("BARE")

import stablesr
for module in pkgutil.walk_packages(stablesr.__path__, "stablesr."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
        print(module.name)
"""


def test_every_module_imports_on_a_machine_with_only_its_dependencies() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE],
        cwd=ROOT,  # first on the path of -c: this checkout, without whatever hooks an editable install uses
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bare, *imported = done.stdout.split()
    assert bare == "BARE"  # the machine really lacks what the tests have
    files = [path.relative_to(ROOT) for path in modules_of("stablesr") if path.name != "__main__.py"]
    names = {".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).parts) for path in files}
    assert names == {"stablesr", *imported}


def test_the_public_names_are_sorted_and_there() -> None:
    names = stablesr.__all__
    # as ruff's RUF022 has it: constants, then classes, then functions
    assert list(names) == sorted(set(names), key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert {"StableSR", "load"} <= set(names)
    assert all(hasattr(stablesr, name) for name in names)


def test_what_looks_public_is_public() -> None:
    looks_public = {
        name
        for name, value in vars(stablesr).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert looks_public <= set(stablesr.__all__)


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    private = re.compile(rb"(?<![\w.:/~-])/(?:work|root|farm)/")  # a path, not the end of a URL
    texts = {}
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            texts[name] = content
    assert "stablesr/__init__.py" in texts
    assert {name: hits for name, content in texts.items() if (hits := private.findall(content))} == {}
