"""The options of `gigasr upscale` and `gigasr plan`, made from the configuration: nothing is said twice.

A field of `Config` is an option under its own name, with its own docstring as help, unless a table here says otherwise.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from pipeline.config import Config, every_option, make_config, read_yaml
from pipeline.errors import ConfigError

PANELS = {
    "": "Raster",
    "model": "Network",
    "sampling": "Picture",
    "radiometry": "Radiometry",
    "file": "Output",
    "run": "Run",
    "grid": "Run",
}
"""Under which heading the options of a section are."""

FLAGS = {
    "scale": ("--scale", "-s"),
    "model.weights": ("--weights", "-m"),
    "sampling.overlap": ("--tile-overlap",),
    "file.compression": ("--compress",),
    "run.folder": ("--run",),
    "run.keep": ("--keep-run",),
}
"""Those that are not just the field's name; GDAL's users should feel at home."""

METAVARS = {
    "bands": "4,3,2",
    "radiometry.stretch": "auto|type|LOW,HIGH",
    "radiometry.percentiles": "LOW,HIGH",
    "run.folder": "FOLDER",
    "run.memory": "GIB",
    "run.commit_seconds": "SECONDS",
    "run.hang_seconds": "SECONDS",
    "run.patience_seconds": "SECONDS",
}

ARGUMENTS = ("source", "output")


@dataclass(frozen=True)
class Given:
    """What was asked for: options of a file, and those of the command line, which win."""

    file: Path | None
    options: Mapping[str, Any]
    """By their dotted path in the configuration."""

    def config(self) -> Config:
        """Raises:
        ConfigError: in the words of the command line for what was said there.
        """
        nested = read_yaml(self.file) if self.file else {}
        for path, value in self.options.items():
            nested = _with(nested, path.split("."), value)
        try:
            return make_config(**nested)
        except ConfigError as error:
            raise ConfigError(self._as_flags(str(error))) from None

    def _as_flags(self, problems: str) -> str:
        named = {path: flags_of(path)[0] for path in self.options if path not in ARGUMENTS}
        named |= {path: path.upper() for path in ARGUMENTS if not self.file}
        return re.sub(r"^([\w.]+)(?=: )", lambda found: named.get(found[1], found[1]), problems, flags=re.MULTILINE)


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is a `Given` as one with all options of the configuration."""
    paths = {_name(path): path for path, _ in every_option()}

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        given = {paths[name]: options.pop(name) for name in list(options) if name in paths}
        file = options.pop("config")
        command(Given(file, {path: value for path, value in given.items() if value is not None}), **options)

    _, *others = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [_argument("source"), _argument("output"), _CONFIG]
    parameters += [_option(path, field) for path, field in every_option() if path not in ARGUMENTS]
    parameters += others
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions do take one
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def flags_of(path: str) -> tuple[str, ...]:
    """
    >>> flags_of("sampling.negative_prompt"), flags_of("scale")
    (('--negative-prompt',), ('--scale', '-s'))
    """
    return FLAGS.get(path) or ("--" + path.rpartition(".")[2].replace("_", "-"),)


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="JOB.YAML",
            help="A file of options, nested as the configuration is; those of the command line win.",
            rich_help_panel="Raster",
        ),
    ],
)


def _argument(name: str) -> inspect.Parameter:
    made = typer.Argument(metavar=name.upper(), help=_help(Config.model_fields[name]), show_default=False)
    annotation = Annotated[str | None, made]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(path: str, field: FieldInfo) -> inspect.Parameter:
    flags = flags_of(path)
    kind = _kind(field.annotation)
    if kind is bool:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
    made = typer.Option(
        *flags,
        help=_help(field),
        metavar=METAVARS.get(path),
        min=_bound(field, "ge"),
        max=_bound(field, "le"),
        show_default=False,  # it is None, for "not given"; the help has that of the configuration
        rich_help_panel=PANELS[path.rpartition(".")[0]],
    )
    annotation = Annotated[kind | None, made]  # type: ignore[valid-type]  # made at run time
    return inspect.Parameter(_name(path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(annotation: Any) -> Any:
    """What the command line makes of a value: a number, a choice, a switch; text, if the configuration reads more."""
    choices = _without_none(annotation)
    simple = choices in (int, float, bool, Path) or get_origin(choices) is Literal
    return choices if simple else str


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


def _bound(field: FieldInfo, kind: Literal["ge", "le"]) -> float | None:
    return next((getattr(bound, kind) for bound in field.metadata if hasattr(bound, kind)), None)


def _name(path: str) -> str:
    return path.replace(".", "_")


def _help(field: FieldInfo) -> str:
    words, default = " ".join((field.description or "").split()), field.default
    if field.is_required() or default is None or default is False or default == "":
        return words
    parts = default if isinstance(default, tuple) else (default,)
    shown = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
    return f"{words} Default: {shown}."


def _with(options: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Options with one more. A section that is none is left, for the configuration to complain of."""
    first, *rest = path
    section = options.get(first, {})
    if not rest:
        return {**options, first: value}
    return {**options, first: _with(section, rest, value) if isinstance(section, Mapping) else section}
