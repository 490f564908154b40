"""The command `gigasr`, mostly with stand-ins for what it calls."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import cli, options
from pipeline.config import Config, every_option
from pipeline.errors import ConfigError, SourceError, Stopped, WorkFailed
from pipeline.events import Listener, Notice, StageFinished, StageStarted, UnitsDone
from pipeline.signals import SIGNALS, TOGETHER_S, Stopping

ROOT = Path(__file__).resolve().parents[2]

StandIn = Callable[..., None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Puts functions in the place of a module of the pipeline."""

    def put(module: str, **functions: Any) -> None:
        monkeypatch.setitem(sys.modules, f"pipeline.{module}", SimpleNamespace(**functions))  # type: ignore[arg-type]

    return put


def gigasr(*arguments: str) -> SimpleNamespace:
    """Exit code, and what was printed where."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


# ---- help ------------------------------------------------------------------------------------------------------------

HEAVY = {"torch", "ray", "rasterio", "zarr", "tifffile", "imagecodecs", "numpy", "skimage", "stablesr"}

SHOW_HELP = """
import sys
from pipeline.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end
print(*{name.partition(".")[0] for name in sys.modules})
"""


@pytest.mark.parametrize("command", [[], ["upscale"], ["models", "pull"], ["--version"]], ids=" ".join)
def test_help_is_there_before_anything_heavy_is_imported(command: list[str]) -> None:
    asked = command if "--version" in command else [*command, "--help"]
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *asked], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    *_, imported = shown.stdout.splitlines()
    assert "typer" in imported.split()
    assert HEAVY & set(imported.split()) == set()


def test_python_m_pipeline_is_gigasr() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.fullmatch(r"gigasr \d+\.\d+\.\d+\S*\n", shown.stdout)


def test_help_says_of_every_option_what_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = " ".join(gigasr("upscale", "--help").out.split())
    for path, field in every_option():
        assert " ".join((field.description or "").split()) in shown, path
    for panel in options.PANELS.values():
        assert f"─ {panel} ─" in shown


# ---- options ---------------------------------------------------------------------------------------------------------

GIVEN: dict[str, tuple[list[str], Any]] = {
    "scale": (["--scale", "2"], 2),
    "bands": (["--bands", "4,3,2"], (4, 3, 2)),
    "model.weights": (["--weights", "sd21-512"], "sd21-512"),
    "model.device": (["--device", "cuda:1"], "cuda:1"),
    "model.precision": (["--precision", "bfloat16"], "bfloat16"),
    "model.compiled": (["--compiled"], True),
    "sampling.steps": (["--steps", "20"], 20),
    "sampling.seed": (["--seed", "7"], 7),
    "sampling.prompt": (["--prompt", "a town"], "a town"),
    "sampling.negative_prompt": (["--negative-prompt", "blurry"], "blurry"),
    "sampling.guidance": (["--guidance", "5.5"], 5.5),
    "sampling.cfw": (["--cfw", "0.75"], 0.75),
    "sampling.color": (["--color", "adain"], "adain"),
    "sampling.sampler": (["--sampler", "ddim"], "ddim"),
    "sampling.eta": (["--eta", "0.5"], 0.5),
    "sampling.start": (["--start", "noise"], "noise"),
    "sampling.posterior": (["--posterior", "sample"], "sample"),
    "sampling.overlap": (["--tile-overlap", "16"], 16),
    "sampling.batch": (["--batch", "4"], 4),
    "sampling.patch": (["--patch", "64"], 64),
    "radiometry.stretch": (["--stretch", "-10,3000"], (-10.0, 3000.0)),
    "radiometry.percentiles": (["--percentiles", "2,98"], (2.0, 98.0)),
    "file.format": (["--format", "bigtiff"], "bigtiff"),
    "file.compression": (["--compress", "deflate"], "deflate"),
    "file.level": (["--level", "9"], 9),
    "file.overwrite": (["--overwrite"], True),
    "run.folder": (["--run", "scratch"], Path("scratch")),
    "run.keep": (["--keep-run"], True),
    "run.workers": (["--workers", "local"], "local"),
    "run.address": (["--address", "ray://head:10001"], "ray://head:10001"),
    "run.max_workers": (["--max-workers", "3"], 3),
    "run.cores": (["--cores", "2"], 2),
    "run.hang_seconds": (["--hang-seconds", "30"], 30.0),
    "run.patience_seconds": (["--patience-seconds", "0"], 0.0),
    "run.commit_seconds": (["--commit-seconds", "5"], 5.0),
    "run.memory": (["--memory", "1.5"], 1.5),
    "grid.block": (["--block", "64"], 64),
}


@pytest.fixture
def configured(stand_in: StandIn) -> Callable[..., Config]:
    """The configuration that `gigasr upscale` runs with."""
    seen: list[Config] = []

    def run(config: Config, *_: Any) -> Path:
        seen.append(config)
        return Path(config.output)

    stand_in("run", run=run)

    def configure(*arguments: str) -> Config:
        done = gigasr("upscale", *arguments)
        assert done.code == 0, done.err
        return seen.pop()

    return configure


def value_of(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("path", [path for path, _ in every_option() if path not in options.ARGUMENTS])
def test_every_option_reaches_the_configuration_alone(path: str, configured: Callable[..., Config]) -> None:
    arguments, value = GIVEN[path]
    config, plain = configured("a.tif", "b.tif", *arguments), configured("a.tif", "b.tif")
    assert value_of(plain, path) != value
    for other, _ in every_option():
        assert value_of(config, other) == (value if other == path else value_of(plain, other))


def test_the_path_is_the_result(stand_in: StandIn) -> None:
    stand_in("run", run=lambda config, listener, stopping: Path(config.output).absolute())
    done = gigasr("upscale", "a.tif", "b.tif")
    assert (done.code, done.out, done.err) == (0, f"{Path('b.tif').absolute()}\n", "")


JOB = """
source: a.tif
output: b.tif
scale: 2
model: {weights: turbo, compiled: true}
sampling: {steps: 3, seed: 5}
"""


def test_the_command_line_wins_over_the_file(tmp_path: Path, configured: Callable[..., Config]) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    job = ["--config", str(tmp_path / "job.yaml")]
    assert configured(*job) == Config(
        source="a.tif", output="b.tif", scale=2,
        model={"weights": "turbo", "compiled": True}, sampling={"steps": 3, "seed": 5},
    )  # fmt: skip
    config = configured("other.tif", *job, "--steps", "4", "--no-compiled", "-s", "8")
    assert (config.source, config.output, config.scale) == ("other.tif", "b.tif", 8)
    assert (config.model.weights, config.model.compiled) == ("turbo", False)
    assert (config.sampling.steps, config.sampling.seed) == (4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "error: SOURCE: must be given\nOUTPUT: must be given\n", id="nothing"),
        pytest.param(["a.tif"], "error: OUTPUT: must be given\n", id="no-output"),
        pytest.param(["a.tif", "b.tif", "--stretch", "5"], "error: --stretch: must be auto, type, or", id="flag"),
        pytest.param(["a.tif", "b.tif", "--memory", "0"], "error: --memory: must be greater than 0", id="bound"),
        pytest.param(["a.tif", "b.tif", "--config", "no.yaml"], "cannot read the configuration 'no.yaml'", id="file"),
        pytest.param(["a.tif", "b.tif", "--scale", "9"], "Invalid value for '--scale'", id="range"),
        pytest.param(["a.tif", "b.tif", "--sampler", "euler"], "Invalid value for '--sampler'", id="choice"),
        pytest.param(["a.tif", "b.tif", "--scales", "2"], "No such option", id="unknown"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_in_their_words(
    arguments: list[str], message: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    stand_in("run", run=raising(AssertionError("nothing should have started")))
    done = gigasr("upscale", *arguments)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_words_of_a_file_stay_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("source: a.tif\nsampling: {steps: 0}\nmodel: 3\n")
    done = gigasr("upscale", "--config", str(tmp_path / "job.yaml"), "--device", "cpu")
    assert done.err.splitlines() == [
        "error: output: must be given",
        "model: must be a mapping of options, not 3",
        "sampling.steps: must be greater than or equal to 1, not 0",
    ]


# ---- errors ----------------------------------------------------------------------------------------------------------


def error_of_networks(name: str, message: str) -> BaseException:
    import stablesr

    error = getattr(stablesr, name)(message)
    assert isinstance(error, BaseException)
    return error


def noted(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        pytest.param(
            SourceError("a.tif: no such file\nhint: look again"), 2, "error: a.tif: no such file\nhint: look again",
            id="user",
        ),
        pytest.param(noted(WorkFailed("boom"), "in block 3"), 1, "error: boom\nin block 3", id="work"),
        pytest.param(Stopped("stopped at step 3\nhint: go on"), 75, "stopped at step 3\nhint: go on", id="stopped"),
        pytest.param(error_of_networks("CheckpointError", "w: too short"), 2, "error: w: too short", id="checkpoint"),
        pytest.param(error_of_networks("DownloadError", "no net"), 1, "error: no net", id="download"),
        pytest.param(
            ZeroDivisionError("by zero\nand more"), 1,
            "internal error: ZeroDivisionError: by zero; run with --debug for the traceback", id="bug",
        ),
        pytest.param(
            ValueError("odd"), 1, "internal error: ValueError: odd; run with --debug for the traceback", id="our-value"
        ),
        pytest.param(KeyboardInterrupt(), 130, "interrupted", id="interrupted"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_a_message_and_an_exit_code(
    error: BaseException, code: int, message: str, debug: bool, stand_in: StandIn
) -> None:
    stand_in("run", run=raising(error))
    done = gigasr("upscale", "a.tif", "b.tif", *(["--debug"] if debug else []))
    assert done.code == code
    assert done.out == ""
    assert done.err.endswith(f"{message}\n")
    assert ("Traceback" in done.err) == debug
    if not debug:
        assert done.err == f"{message}\n"


def test_weights_that_do_not_exist_are_the_users_mistake(stand_in: StandIn) -> None:
    def run(config: Config, *_: Any) -> None:
        import stablesr

        stablesr.load(config.model.weights)

    stand_in("run", run=run)
    done = gigasr("upscale", "a.tif", "b.tif", "-m", "huge")
    assert done.code == 2
    assert done.err == "error: 'huge' is neither a file nor one of the presets sd21-512, sd21-768v, turbo, tiny\n"


def test_with_json_lines_an_error_is_one(stand_in: StandIn) -> None:
    stand_in("run", run=raising(SourceError("a.tif: no such file")))
    done = gigasr("upscale", "a.tif", "b.tif", "--log", "json")
    told = json.loads(done.err)
    assert told.pop("time").endswith("Z")
    assert told == {"event": "Error", "message": "error: a.tif: no such file", "exit_code": 2}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small raster, a text, a folder and an old output; the working directory."""
    from pipeline import demo

    monkeypatch.chdir(tmp_path)
    demo.write_source(Path("scene.tif"), demo.photograph()[:, :24, :32])
    Path("letter.tif").write_text("Dear raster, I am none.")
    Path("half.tif").write_bytes(Path("scene.tif").read_bytes()[:200])
    Path("empty.tif").touch()
    Path("folder.tif").mkdir()
    Path("old.tif").write_text("precious")
    Path("weights.safetensors").write_text("light")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        pytest.param(["missing.tif", "out.tif"], "missing.tif", id="missing"),
        pytest.param(["folder.tif", "out.tif"], "folder.tif", id="a-folder"),
        pytest.param(["letter.tif", "out.tif"], "letter.tif", id="not-a-raster"),
        pytest.param(["half.tif", "out.tif"], "half.tif", id="truncated"),
        pytest.param(["empty.tif", "out.tif"], "empty.tif", id="empty"),
        pytest.param(["scene.tif", "out.tif", "--bands", "9"], "9", id="band-9-of-3"),
        pytest.param(["scene.tif", "scene.tif", "--overwrite"], "scene.tif", id="onto-itself"),
        pytest.param(["scene.tif", "old.tif"], "--overwrite", id="output-exists"),
        pytest.param(["scene.tif", "nowhere/out.tif"], "nowhere", id="no-such-folder"),
        pytest.param(["scene.tif", "out.jpg"], "--format", id="unknown-format"),
        pytest.param(["scene.tif", "out.tif", "-m", "huge"], "huge", id="unknown-preset"),
        pytest.param(["scene.tif", "out.tif", "-m", "weights.safetensors"], "weights.safetensors", id="no-weights"),
        pytest.param(["scene.tif", "out.tif", "--tile-overlap", "64"], "64", id="tiles-that-do-not-advance"),
        pytest.param(["scene.tif", "out.tif", "--memory", "1e9"], "memory", id="does-not-fit"),
    ],
)
def test_what_cannot_be_done_is_one_error_and_leaves_nothing_behind(
    arguments: list[str], about: str, scene: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in scene.rglob("*")}
    done = gigasr("upscale", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and about in done.err
    assert "Traceback" not in done.err
    assert {path: path.stat().st_mtime_ns for path in scene.rglob("*")} == before


def test_a_plan_of_a_real_raster_is_printed(scene: Path) -> None:
    done = gigasr("plan", "scene.tif", "out.tif", "-m", "nearest", "--no-measure")
    assert (done.code, done.err) == (0, "")
    assert "32 x 24 pixels" in done.out and "128 x 96 pixels" in done.out
    assert not Path("out.tif").exists()


def test_a_run_that_is_kept_can_be_looked_at_and_verified(scene: Path) -> None:
    options = ["-m", "nearest", "--workers", "local", "--keep-run", "--quiet"]
    done = gigasr("upscale", "scene.tif", "out.tif", *options)
    assert (done.code, done.out, done.err) == (0, "out.tif\n", "")
    status = json.loads(gigasr("status", "out.tif.run", "--json").out)
    assert status["output"] == "out.tif"
    assert gigasr("verify", "out.tif.run", "--quiet").out == "sound\n"


# ---- what a run says -------------------------------------------------------------------------------------------------


def talkative(config: Config, listener: Listener, stopping: Stopping) -> Path:
    import logging
    import warnings

    warnings.warn("a matter of some library", stacklevel=1)
    logging.getLogger("stablesr").info("the licence of the weights")
    listener(StageStarted("encode", 2, 0))
    listener(UnitsDone("encode", 2))
    listener(StageFinished("encode", 1.0))
    listener(Notice("the weights are not trained", warning=True))
    return Path(config.output)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(
            [],
            [
                "the licence of the weights", "encode: 2 blocks", "encode: finished in 1.0 s",
                "warning: the weights are not trained",
            ],
            id="plain",
        ),
        pytest.param(["--quiet"], ["warning: the weights are not trained"], id="quiet"),
    ],
)  # fmt: skip
def test_a_run_is_heard_on_stderr(arguments: list[str], told: list[str], stand_in: StandIn) -> None:
    stand_in("run", run=talkative)
    done = gigasr("upscale", "a.tif", "b.tif", *arguments)
    assert (done.code, done.out) == (0, "b.tif\n")
    assert done.err.splitlines() == told


def test_a_program_gets_json(stand_in: StandIn) -> None:
    stand_in("run", run=talkative)
    told = [json.loads(line) for line in gigasr("upscale", "a.tif", "b.tif", "--log", "json").err.splitlines()]
    assert [event["event"] for event in told] == ["Notice", "StageStarted", "UnitsDone", "StageFinished", "Notice"]


# ---- signals ---------------------------------------------------------------------------------------------------------

A_RUN_THAT_WAITS = """
import signal, sys, time, types
from pipeline.errors import Stopped

def run(config, listener, stopping):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init() may
    stopping.install()
    print("running", file=sys.__stdout__, flush=True)  # what is printed in a run is not shown
    while not (stopping() and config.sampling.prompt == "polite"):
        time.sleep(0.01)
    raise Stopped("stopped after step 3 of 8; the same command goes on")

sys.modules["pipeline.run"] = types.SimpleNamespace(run=run)
from pipeline.cli import main
main()
"""

ASKED = "warning: stopping after the current step; again to stop at once\n"


def start(prompt: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", A_RUN_THAT_WAITS, "upscale", "a.tif", "b.tif", "--prompt", prompt],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_the_first_signal_stops_a_run_between_steps(number: signal.Signals) -> None:
    with start("polite") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert (out, err) == ("", ASKED + "stopped after step 3 of 8; the same command goes on\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_the_second_signal_stops_at_once(number: signal.Signals) -> None:
    with start("stubborn") as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == ASKED  # at once, though the run does not look
        time.sleep(1.2 * TOGETHER_S)
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -number


def test_signals_that_come_together_are_one() -> None:
    with start("polite") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 75


def test_afterwards_signals_are_whose_they_were() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with cli.at_work(None, quiet=True) as (_, stopping):
        assert not stopping()
        assert [signal.getsignal(number) for number in SIGNALS] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
    assert [signal.getsignal(number) for number in SIGNALS] == before


# ---- the other commands ----------------------------------------------------------------------------------------------


class Plan:
    def model_dump_json(self) -> str:
        return '{"blocks": 4}'

    def report(self, seconds: float | None) -> list[tuple[str, str]]:
        return [("blocks", "4"), *([("expected", f"{seconds} s")] if seconds is not None else [])]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        pytest.param([], "blocks    4\nexpected  7.5 s\n", id="measured"),
        pytest.param(["--no-measure"], "blocks  4\n", id="not-measured"),
        pytest.param(["--json"], '{"blocks": 4, "expected_seconds": 7.5}\n', id="json"),
        pytest.param(["--json", "--no-measure"], '{"blocks": 4, "expected_seconds": null}\n', id="json-not-measured"),
    ],
)
def test_plan_prints_and_starts_nothing(arguments: list[str], printed: str, stand_in: StandIn) -> None:
    seen = []
    stand_in("run", run=raising(AssertionError))
    stand_in("plan", make_plan=lambda config: seen.append(config) or Plan())
    stand_in("estimate", measure_seconds=lambda plan: 7.5)
    done = gigasr("plan", "a.tif", "b.tif", "-s", "2", *arguments)
    assert (done.code, done.out, done.err) == (0, printed, "")
    assert [config.scale for config in seen] == [2]


def test_a_plan_that_does_not_fit_is_refused(stand_in: StandIn) -> None:
    stand_in("plan", make_plan=raising(ConfigError("too small")))
    assert gigasr("plan", "a.tif", "b.tif").code == 2


def test_status_prints_what_was_read(stand_in: StandIn) -> None:
    found = SimpleNamespace(
        report=lambda: [("ingest", "4 of 4"), ("x", "y")], model_dump_json=lambda: '{"folder": "a.run"}'
    )
    stand_in("status", read_status=lambda folder: found if folder == Path("a.run") else None)
    assert gigasr("status", "a.run").out == "ingest  4 of 4\nx       y\n"
    assert json.loads(gigasr("status", "a.run", "--json").out) == {"folder": "a.run"}


def test_status_is_printed_again_and_again_until_the_run_has_ended(stand_in: StandIn) -> None:
    def found(n: int) -> SimpleNamespace:
        return SimpleNamespace(report=lambda: [("encode", f"{n} of 2")], model_dump_json=lambda: f'{{"done": {n}}}')

    stand_in("status", read_status=raising(AssertionError), watch_status=lambda folder: map(found, (1, 2)))
    assert gigasr("status", "a.run", "--watch").out == "encode  1 of 2\n\nencode  2 of 2\n\n"
    assert gigasr("status", "a.run", "--watch", "--json").out == '{"done": 1}\n{"done": 2}\n'


@pytest.mark.parametrize(
    ("damaged", "code", "printed"),
    [
        pytest.param([], 0, "sound\n", id="sound"),
        pytest.param(["output/0 at (0, 1)", "mask"], 1, "damaged: output/0 at (0, 1)\ndamaged: mask\n", id="damaged"),
    ],
)
def test_verify_tells_what_is_damaged(damaged: list[str], code: int, printed: str, stand_in: StandIn) -> None:
    stand_in("verify", verify_run=lambda folder, listener: damaged)
    done = gigasr("verify", "a.run")
    assert (done.code, done.out) == (code, printed)
    done = gigasr("verify", "a.run", "--json")
    assert (done.code, json.loads(done.out)) == (code, {"sound": not damaged, "damaged": damaged})


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIGASR_HOME", str(tmp_path))
    return tmp_path


def test_the_list_of_models_says_what_is_here_and_under_which_licence(cache: Path) -> None:
    from stablesr import hub

    (cache / "sd21-768v-bfloat16.safetensors").touch()
    for file in hub.RELEASED["turbo"]:
        (cache / file.filename).touch()
    rows = {line.split()[0]: line for line in gigasr("models", "list").out.splitlines()}
    assert list(rows) == ["preset", "sd21-512", "sd21-768v", "turbo", "tiny"]
    assert "6.5 GB to download" in rows["sd21-512"]  # the decoder is that of turbo, and here
    assert "ready (bfloat16)" in rows["sd21-768v"]
    assert "downloaded; converted at first use" in rows["turbo"]
    assert "embedded" in rows["tiny"]
    assert all("S-Lab License 1.0 (non-commercial)" in rows[preset] for preset in hub.RELEASED)


def test_pull_names_the_licence_and_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stablesr import hub

    monkeypatch.setattr(hub, "pull", lambda preset, progress: (tmp_path / preset,))
    done = gigasr("models", "pull", "turbo")
    assert (done.code, done.out) == (0, f"{tmp_path / 'turbo'}\n")
    assert "non-commercial" in done.err


def test_the_presets_to_pull_are_those_that_were_released() -> None:
    from typing import get_args

    from stablesr import hub

    assert set(get_args(cli.Released)) == set(hub.RELEASED)


def test_convert_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stablesr import PRESETS, checkpoint

    asked: list[Any] = []
    monkeypatch.setattr(checkpoint, "convert", lambda *given: asked.extend(given) or given[2])
    done = gigasr(
        "models", "convert", "s.ckpt", "c.ckpt", "-o", "w.safetensors", "--preset", "turbo", "--dtype", "bf16"
    )
    assert (done.code, done.out) == (0, "w.safetensors\n")
    assert asked == [Path("s.ckpt"), Path("c.ckpt"), Path("w.safetensors"), PRESETS["turbo"], torch.bfloat16]


def test_verify_of_weights_that_are_not_here_fails(cache: Path) -> None:
    assert gigasr("models", "verify", "tiny").out == "tiny is part of the package\n"
    done = gigasr("models", "verify", "turbo")
    assert (done.code, done.out) == (1, "")
    assert "no such file\nhint: download it first" in done.err
