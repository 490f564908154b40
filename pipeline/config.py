"""One frozen configuration, read once: from YAML, from the command line, from keywords.

Functions below the run take values, not the configuration.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.errors import ConfigError

Format = Literal["cog", "bigtiff", "ome-tiff", "ome-zarr"]
Compression = Literal["zstd", "deflate", "lzw", "none"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

NEAREST = "nearest"
"""Weights of the network that only repeats pixels: a rehearsal of a run, without a model."""


HIGHEST_LEVEL = {"zstd": 22, "deflate": 9}
"""Of the compressions that have levels."""


def _at_commas(value: Any) -> Any:
    """`"4,3,2"` as the list it stands for: on a command line, and wherever else it is handier."""
    return value.split(",") if isinstance(value, str) and "," in value else value


def _as_stretch(value: Any) -> Any:
    if isinstance(value, str) and value in ("auto", "type"):
        return value
    try:
        low, high = map(float, value.split(",") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise ValueError(f"must be auto, type, or two numbers as in 0,3000; not {value!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"must rise from black to white; not {low:g},{high:g}")
    return low, high


def _as_list(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N; not {name!r}")
    return name


Name = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
"""Of a file or a URL; a path will do."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """Which network, and where it computes."""

    weights: Name = "tiny"
    """A preset (tiny, sd21-512, sd21-768v, turbo), a model file, or nearest, which rehearses a run without
    a network."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    precision: Precision = "auto"
    """What the networks compute in; auto is bfloat16 on a GPU, float32 elsewhere."""
    compiled: bool = False
    """Compile the UNet: slow to start, faster after it."""


class Sampling(Section):
    """How the picture is made. Each of these changes pixels."""

    steps: int | None = Field(None, ge=1, le=1000)
    """Diffusion steps; as many as the preset has, unless given."""
    seed: int = Field(0, ge=0, lt=1 << 64)
    """Of the noise: another seed, another picture."""
    prompt: str = ""
    """What the picture shows, if words help."""
    negative_prompt: str | None = None
    """What it should not look like; turns guidance on."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none."""
    cfw: float = Field(0.5, ge=0, le=1)
    """How much the decoder sees of the source: 0 for most detail, 1 for most fidelity."""
    color: Literal["wavelet", "adain", "none"] = "wavelet"
    """How colours are brought back to those of the source."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """How a step leads to the next: DDPM, as published, or DDIM."""
    eta: float = Field(0.0, ge=0, le=1)
    """Of DDIM: 0 is deterministic, 1 as random as DDPM."""
    start: Literal["latent", "noise"] = "latent"
    """From the noised low-resolution latent, as published, or from pure noise."""
    posterior: Literal["mean", "sample"] = "mean"
    """Whether the low-resolution latent is the posterior's mean or a sample of it."""
    overlap: int | None = Field(None, ge=0)
    """Latents that neighbouring tiles share; half a tile, unless given."""
    batch: int = Field(1, ge=1)
    """Tiles that go through the network at once."""
    patch: int = Field(128, ge=8)
    """Side of what the autoencoder sees at once, in latents (8 target pixels)."""


class Radiometry(Section):
    """How samples become what the network sees, and back."""

    stretch: Annotated[Literal["auto", "type"] | tuple[float, float], BeforeValidator(_as_stretch)] = "auto"
    """What the network sees as black and white: two values; or, with type, the whole range of the samples' type; or,
    with auto, that range for 8 bits and percentiles of the valid pixels, band by band, for anything else."""
    percentiles: Annotated[tuple[float, float], BeforeValidator(_at_commas)] = (0.1, 99.9)
    """Of the automatic stretch."""

    @model_validator(mode="after")
    def _ends_in_order(self) -> Self:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles={self.percentiles} must rise, within 0 and 100")
        return self


class Output(Section):
    """The file that is written."""

    format: Format | None = None
    """By the output's name, unless given: .ome.tif and .ome.tiff are pyramidal OME-TIFF, .zarr OME-Zarr, .btf plain
    BigTIFF, .tif and .tiff a COG."""
    compression: Compression | None = None
    """zstd, unless given; none for plain BigTIFF."""
    level: int | None = Field(None, ge=1, le=22)
    """Of the compression; 3 for zstd and 6 for deflate, unless given."""
    overwrite: bool = False
    """Replace the output if it exists, once the new one is complete."""

    @model_validator(mode="after")
    def _the_compression_has_the_level(self) -> Self:
        if self.level is not None and self.compression is not None:
            highest = HIGHEST_LEVEL.get(self.compression)
            if highest is None:
                raise ValueError(f"level={self.level} says nothing: compression={self.compression} has no levels")
            if self.level > highest:
                raise ValueError(f"level={self.level} of compression={self.compression} must be at most {highest}")
        return self


class Run(Section):
    """How the work is done. None of these changes a pixel, nor whether a run can be resumed."""

    folder: Path | None = None
    """Where the run keeps what is finished; beside the output, its name with `.run` added, unless given."""
    keep: bool = False
    """Keep the folder after the run."""
    workers: Literal["ray", "local"] = "ray"
    """Ray, one worker for each GPU or, without any, for each machine; or all in this process."""
    address: str | None = None
    """Of a Ray cluster; Ray is started in this process, and ended with it, unless given."""
    max_workers: int | None = Field(None, ge=1)
    """At most so many workers on Ray. On a cluster that grows by itself, so many are asked for."""
    cores: int | None = Field(None, ge=1)
    """CPU cores of a worker without a GPU; all of its machine's, unless given."""
    hang_seconds: float = Field(60.0, gt=0)
    """A worker that gets nowhere for this long, and for 20 times as long as such work took it at most, is replaced;
    where that is not known yet, after ten times this long."""
    patience_seconds: float = Field(60.0, ge=0)
    """How long a disk that refuses to be read or written is tried again before the run gives up."""
    commit_seconds: float = Field(60.0, ge=0)
    """Sampling is committed to disk this often; 0 commits every step."""
    memory: float = Field(4.0, gt=0)
    """GiB that a worker may use for pixels and latents, beside the network. Canvases whose latents exceed it are
    streamed from the run's folder at every step."""

    @model_validator(mode="after")
    def _these_are_rays(self) -> Self:
        for name in ("address", "max_workers", "cores"):
            if (value := getattr(self, name)) is not None and self.workers != "ray":
                raise ValueError(f"{name}={value!r} is about Ray, but workers={self.workers}")
        return self


class Grid(Section):
    """How the canvas is cut. A run in progress keeps to it. It changes no pixel, but for some beside holes wider than
    32 source pixels: the middle of these is filled with the mean of the block."""

    block: int = Field(256, ge=8)
    """Side of a block, in latents: the unit of storage, retry and progress."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block} must be a power of two")
        return self


class Config(Section):
    """A whole run."""

    source: Name
    """A raster: any that GDAL opens, or a pyramidal TIFF (SVS, NDPI, OME-TIFF)."""
    output: Name
    """The raster to write; its name tells the format."""
    scale: int = Field(4, ge=1, le=8)
    """Pixels of the target along a side of one pixel of the source."""
    bands: Annotated[tuple[int, ...], BeforeValidator(_as_list)] | None = None
    """Counted from 1, in the order wanted; all of them, unless given. The first three go through the network together,
    then the next three."""
    model: Model = Model()
    sampling: Sampling = Sampling()
    radiometry: Radiometry = Radiometry()
    file: Output = Output()
    grid: Grid = Grid()
    run: Run = Run()

    @model_validator(mode="after")
    def _bands_count_from_one(self) -> Self:
        if self.bands is not None and (not self.bands or min(self.bands) < 1 or len(set(self.bands)) < len(self.bands)):
            raise ValueError(f"bands={list(self.bands)} must be different numbers, the first band being 1")
        return self

    @property
    def format(self) -> Format:
        """Of the output.

        Raises:
            ConfigError: if the name does not tell.
        """
        return self.file.format or format_of(self.output)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.run.folder or Path(self.output.rstrip("/") + ".run")

    @property
    def what_makes_pixels(self) -> dict[str, Any]:
        """All options that change the output; a run is resumed only with the same."""
        plain = self.model_dump(mode="json", exclude={"run", "source", "output", "model"})
        del plain["file"]["overwrite"]
        plain["file"]["format"] = self.format
        return {**plain, "model": {"precision": self.model.precision, "compiled": self.model.compiled}}


def format_of(name: str) -> Format:
    """The format that an output's name stands for."""
    lower = name.lower().rstrip("/")
    endings: dict[str, Format] = {
        ".ome.tif": "ome-tiff", ".ome.tiff": "ome-tiff", ".zarr": "ome-zarr", ".btf": "bigtiff", ".tif": "cog",
        ".tiff": "cog",
    }  # fmt: skip
    for ending, kind in endings.items():
        if lower.endswith(ending):
            return kind
    raise ConfigError(
        f"the name of the output {name!r} does not tell its format\n"
        f"hint: end it in {', '.join(endings)}, or give --format {'|'.join(get_args(Format))}"
    )


def make_config(**options: Any) -> Config:
    """A configuration from (nested) keywords.

    Raises:
        ConfigError: if one is unknown, missing or out of its range.
    """
    try:
        return Config(**options)
    except ValidationError as error:
        raise ConfigError(_in_words(error)) from None


def every_option(section: type[BaseModel] = Config, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option of a configuration: its dotted path, and what is known of it."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from every_option(field.annotation, f"{above}{name}.")
        else:
            yield above + name, field


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of a YAML file, nested as in `Config`, not yet checked. What is null is not given.

    Raises:
        ConfigError: if it cannot be read, or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {os.fspath(path)!r}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{os.fspath(path)} is not YAML: {error}") from None
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"{os.fspath(path)} must be a mapping of options, such as `scale: 4`")
    return {key: value for key, value in options.items() if value is not None}


IN_WORDS = {
    "missing": "must be given",
    "extra_forbidden": "there is no such option",
    "too_short": "must not be empty",
    "too_long": "has too many values",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "tuple_type": "must be a list of values",
    "model_type": "must be a mapping of options",
}
"""What pydantic says in a programmer's words."""


def _in_words(error: ValidationError) -> str:
    problems = [_place_and_problem(problem) for problem in error.errors()]
    lines: dict[str, str] = {}
    for where, what in problems:  # a value that may be of several kinds has a problem with each
        lines[where] = f"{lines[where]}; or {what}" if where in lines and what not in lines[where] else what
    return "\n".join(f"{where}: {what}" if where else what for where, what in lines.items())


def _place_and_problem(problem: ErrorDetails) -> tuple[str, str]:
    kind = problem["type"]  # a place also names the type that was tried, as in `tuple[float,float]`, and the position
    where = ".".join(part for part in problem["loc"] if isinstance(part, str) and not set("[](),") & set(part))
    what = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    what = IN_WORDS.get(kind, what)
    if kind == "extra_forbidden" and (meant := _meant(where)):
        what += f"; did you mean {meant}?"
    return where, what if kind in ("missing", "extra_forbidden", "value_error") else f"{what}, not {problem['input']!r}"


def _meant(path: str) -> str | None:
    paths = dict(every_option())
    same_name = [known for known in paths if known.rpartition(".")[2] == path.rpartition(".")[2]]
    close = difflib.get_close_matches(path, [*paths, *Config.model_fields], n=1)
    return next(iter(same_name + close), None)
