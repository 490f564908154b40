"""What happens in a run, as small values; progress bars and logs only listen."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RunStarted:
    """A run begins, or goes on."""

    run: str
    """Folder of the run."""
    source: str
    output: str
    resumed: bool


@dataclass(frozen=True)
class StageStarted:
    """A stage begins. Stages are ingest, encode, sample, decode, overviews, export, in this order."""

    stage: str
    total: int
    """Units of the stage: blocks; of sampling, diffusion steps times blocks; of export, tiles of the file."""
    done: int
    """Of these, finished by an earlier start of the run."""


@dataclass(frozen=True)
class UnitsDone:
    """Some units of a stage were computed; of sampling not yet committed."""

    stage: str
    n: int
    """Below 0 for steps that were taken but not committed when a worker was lost."""


@dataclass(frozen=True)
class Committed:
    """Sampling is on disk up to and including a step."""

    step: int
    """Diffusion steps done."""
    steps: int
    seconds: float
    """Spent writing."""


@dataclass(frozen=True)
class StepTaken:
    """All workers have taken a diffusion step."""

    step: int
    """Steps done."""
    seconds: float
    """Since the step before, or the beginning of the round."""
    tiles: int
    """That went through the network; this and what follows is 0 where latents are streamed."""
    predicting_s: float
    """Spent on that by all workers together."""
    sent_bytes: int
    """From worker to worker."""


@dataclass(frozen=True)
class WorkerJoined:
    """A worker has loaded the network and takes part from now on."""

    worker: int
    """Its number; no two workers of a run's start have the same."""
    device: str
    node: str
    """Of the machine it is on."""


@dataclass(frozen=True)
class WorkerLeft:
    """A worker is lost; what it was doing is done again."""

    worker: int
    why: str


@dataclass(frozen=True)
class StageFinished:
    """A stage is complete."""

    stage: str
    seconds: float
    """Of this start of the run."""


@dataclass(frozen=True)
class Notice:
    """Something the user should know; `warning` if it may need an answer."""

    message: str
    warning: bool = False


@dataclass(frozen=True)
class RunFinished:
    """The output is in its place."""

    output: str
    seconds: float
    """Of this start of the run."""


Event = (
    RunStarted
    | StageStarted
    | UnitsDone
    | Committed
    | StepTaken
    | WorkerJoined
    | WorkerLeft
    | StageFinished
    | Notice
    | RunFinished
)
Listener = Callable[[Event], None]
