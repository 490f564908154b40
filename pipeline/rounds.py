"""Sampling in rounds: who has which part of the canvas, steps with one exchange each, and commits.

    assign    a rectangle of blocks to each worker that is alive, so that all need about the same time
    load      each reads x_t and the low-resolution latents of its share
    per step  border    the tiles that the neighbours need are predicted, and travel
              interior  the others are predicted meanwhile
              advance   the neighbours' tiles have arrived; the share is blended and takes the step
    commit    each writes its blocks; then one marker names the step and the slot

A round ends where work is to be shared out anew: a worker is lost, others have joined, or some turn out faster. What
was not committed is then computed again, from the latest commit, to the same bits.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import BlockFailed, StoreFailed, WorkerLost
from pipeline.events import Committed, Event, Notice, StepTaken, UnitsDone
from pipeline.grid import Index, Loads, Share, neighbours
from pipeline.plan import Plan
from pipeline.stages import encode, sample
from pipeline.status import newest_slot
from pipeline.store import RunStore
from pipeline.supervisor import Supervisor, Task
from pipeline.worker import Advanced
from pipeline.workers import Workers
from stablesr.box import Box

LONGEST_COMMIT_INTERVAL_S = 600.0
"""However much a commit writes, no more work than this is lost with a machine."""

FASTER = 1.15
"""How much longer the slowest worker must need than it would in fair shares, before work is shared out anew."""

NEWEST_SHARE = 0.5
"""Weight of a round in a worker's speed, beside what was known of it."""


@dataclass
class Rounds:
    """The diffusion steps of one layer."""

    plan: Plan
    store: RunStore
    supervisor: Supervisor
    layer: int
    _speeds: dict[int, float] = field(default_factory=dict)
    """Of workers, in tiles a second."""
    _cautious: int = 0
    """After a loss, in how many steps the next commit is due; 0 if it is due by time."""
    _known_loads: Loads | None = None

    @property
    def workers(self) -> Workers:
        return self.supervisor.workers

    def run(self) -> None:
        """All steps that are not committed yet."""
        plan = self.plan
        while True:
            slot, step = newest_slot(self.store, self.layer)
            if step == plan.steps:
                return
            self.supervisor.stop_if_asked()
            crew = self._fastest(self.supervisor.crew())
            rectangles, resident = plan.rectangles(self._speeds_of(crew), self._loads)
            if not resident:
                self._stream_step(rectangles, step, slot)
                continue
            shares = [Share(plan.canvas, rectangle) for rectangle in rectangles]
            round = _Round(self, dict(zip(crew, shares, strict=False)), slot, step)
            try:
                round.run()
            except (WorkerLost, BlockFailed) as loss:
                self._recover(round, loss)

    # Who does what

    def _fastest(self, crew: list[int]) -> list[int]:
        """No more workers than there are blocks."""
        speeds = dict(zip(crew, self._speeds_of(crew), strict=True))
        n = len(self.plan.canvas.blocks)
        return sorted(sorted(crew, key=lambda worker: -speeds[worker])[:n])

    def _speeds_of(self, crew: Sequence[int]) -> list[float]:
        """Whoever is new is taken for average."""
        known = [self._speeds[worker] for worker in crew if worker in self._speeds]
        usual = sum(known) / len(known) if known else 1.0
        return [self._speeds.get(worker, usual) for worker in crew]

    @property
    def _loads(self) -> Loads:
        """Tiles with something to see, of each block."""
        if self._known_loads is None:
            self._known_loads = self._count_tiles()
        return self._known_loads

    def _count_tiles(self) -> Loads:
        canvas = self.plan.canvas
        if self.plan.header.validity == "all":
            return Loads.of_tiles(canvas)
        blocks = canvas.blocks
        rows = [[0.0] * blocks.columns for _ in range(blocks.rows)]
        for (row, column), marker in self.store.markers(f"encode/{self.layer}"):
            rows[row][column] = float(marker[encode.TILES])
        return Loads(rows)

    def slowest_s(self, shares: Mapping[int, Share]) -> float:
        """How long a step takes the worker that needs longest."""
        speeds = self._speeds_of([*shares])
        loads = (self._loads.of(share.rectangle) for share in shares.values())
        return max(load / speed for load, speed in zip(loads, speeds, strict=True))

    def could_be_fairer(self, shares: Mapping[int, Share], steps_left: int, loading_s: float) -> bool:
        """Whether sharing out the work anew gains more time than it takes."""
        crew = self._fastest(self.workers.live())
        if {*crew} - {*shares}:
            return True
        if not all(worker in self._speeds for worker in crew):
            return False
        rectangles, _ = self.plan.rectangles(self._speeds_of(crew), self._loads)
        fair = {worker: Share(self.plan.canvas, box) for worker, box in zip(crew, rectangles, strict=False)}
        now_s, then_s = self.slowest_s(shares), self.slowest_s(fair)
        return now_s > FASTER * then_s and steps_left * (now_s - then_s) > 2 * loading_s

    def measured(self, worker: int, tiles: int, predicting_s: float) -> None:
        """A worker has predicted so many tiles."""
        if tiles and predicting_s:
            new = tiles / predicting_s
            old = self._speeds.get(worker, new)
            self._speeds[worker] = NEWEST_SHARE * new + (1 - NEWEST_SHARE) * old

    # What is lost

    def _recover(self, round: "_Round", loss: WorkerLost | BlockFailed) -> None:
        """A round has ended in a loss: forget it, and count whose blocks it was.

        Raises:
            BlockFailed: if that was too often without a step committed in between.
        """
        supervisor, in_vain = self.supervisor, round.abandon()
        supervisor.tell(
            Notice(
                f"sampling goes on from step {round.committed} of {self.plan.steps}; {in_vain} more are taken again: "
                f"{str(loss).splitlines()[0]}",
                warning=True,
            )
        )
        if in_vain:
            supervisor.tell(UnitsDone("sample", -in_vain * len(self.plan.canvas.blocks)))
        stage = f"sample/{self.layer}"
        if isinstance(loss, BlockFailed):
            supervisor.charge(stage, loss.index, loss)
            self.workers.discard(round.owner(loss.index), "a block failed on it, and it is not trusted any more")
        else:
            gone = round.shares.keys() - {*self.workers.live()}
            for worker in gone or round.shares.keys():
                for index in round.shares[worker].own:
                    supervisor.charge(stage, index, loss)
        self._cautious = 1

    def relax(self) -> None:
        """A commit was made: the next is due later."""
        self.supervisor.forgive()
        self._cautious *= 2

    def is_due(self, since_s: float, step_s: float, uncommitted: int) -> bool:
        """Whether to commit."""
        by_time = since_s >= self._commit_interval_s(step_s)
        return by_time or 0 < self._cautious <= uncommitted

    def _commit_interval_s(self, step_s: float) -> float:
        """As often as asked for, but if what the commits write would take the run beyond twice the size of its output,
        less often; yet never more than ten minutes apart."""
        wanted = self.plan.config.run.commit_seconds
        if wanted == 0:
            return 0.0
        spread = step_s * self.plan.steps / self.plan.n_affordable_commits
        return max(wanted, min(spread, LONGEST_COMMIT_INTERVAL_S))

    # Streaming

    def _stream_step(self, rectangles: Sequence[Box], step: int, slot: str | None) -> None:
        """One step of all shares, one after another, from one slot to the other."""
        started, next_slot = self.supervisor.clock(), sample.other_slot(slot)
        self.store.unmark(f"sample/{self.layer}/{next_slot}")
        folder = f"stream/{self.layer}/{step + 1}"
        shares = {f"{folder}/{r.top}-{r.left}-{r.bottom}-{r.right}": Share(self.plan.canvas, r, streamed=True)
                  for r in rectangles}  # fmt: skip

        def tasks() -> Iterator[Task]:
            for unit, share in shares.items():
                if self.store.marker(unit) is None:
                    yield self._stream_task(unit, share, step, slot, next_slot)

        self.supervisor.fan_out("sample", tasks())
        self.supervisor.stop_if_asked()  # a share may have been given up
        self.supervisor.tell(StepTaken(step + 1, self.supervisor.clock() - started, 0, 0.0, 0))
        self.seal(next_slot, step + 1, [self.store.marker(unit) or {} for unit in shares], started)
        self.store.unmark(folder)

    def _stream_task(self, unit: str, share: Share, step: int, slot: str | None, next_slot: str) -> Task:
        def ask(worker: int) -> Any:
            return self.workers.ask(worker, "stream", unit, self.layer, share, step, slot, next_slot)

        corner = share.rectangle.top, share.rectangle.left
        n_blocks = share.rectangle.height * share.rectangle.width
        return Task(unit, f"sample/{self.layer}", corner, ask, n_blocks)

    def seal(self, slot: str, step: int, written: Sequence[dict[str, int]], started: float) -> None:
        """All blocks of a step are in a slot: from now on it counts."""
        checksums = {block: value for share in written for block, value in share.items()}
        self.store.mark(f"sample/{self.layer}/{slot}", {"step": step, "checksums": checksums})
        self.supervisor.tell(Committed(step, self.plan.steps, self.supervisor.clock() - started))


class _Round:
    """Steps with the same shares."""

    def __init__(self, rounds: Rounds, shares: dict[int, Share], slot: str | None, step: int) -> None:
        """
        Args:
            shares: by worker.
        """
        self.rounds, self.shares, self.slot = rounds, shares, slot
        self.plan, self.supervisor, self.layer = rounds.plan, rounds.supervisor, rounds.layer
        self.committed = self.taken = self.asked = step
        """Steps that are committed; that all workers are known to have taken; that they were asked to take."""
        order, regions = [*shares], [share.region for share in shares.values()]
        near = neighbours([*shares.values()])
        self._near = {worker: [order[i] for i in near[k]] for k, worker in enumerate(order)}
        self._reaches = {worker: [regions[i] for i in near[k]] for k, worker in enumerate(order)}
        self._under_way: deque[list[Any]] = deque()
        """Of each step that was asked for and is not taken: the handles of its end."""
        self._began = self._heard = self._committed_at = self.supervisor.clock()
        self._first = step
        self._halted = False
        self._untold: list[Event] = []
        """Steps that were taken; they are told of once the commit that is due is made."""

    def owner(self, index: Index) -> int:
        """The worker that has a block."""
        row, column = index
        cell = Box(row, column, row + 1, column + 1)
        return next(worker for worker, share in self.shares.items() if share.rectangle.overlap(cell))

    def run(self) -> None:
        """Load, step and commit, to the last step or until work should be shared out anew.

        Raises:
            WorkerLost, BlockFailed: then what is not committed is lost.
        """
        supervisor, rounds, steps = self.supervisor, self.rounds, self.plan.steps
        rounds.store.unmark(f"stream/{self.layer}")  # where a step was half streamed, commits are written now
        supervisor.gather([self._ask(worker, "load", self.layer, share, self.committed, self.slot)
                           for worker, share in self.shares.items()])  # fmt: skip
        loading_s, self._began = self.supervisor.clock() - self._began, self.supervisor.clock()
        self._heard = self._committed_at = self._began
        while self.taken < steps:
            due = self.asked == steps or self._is_due()
            while not due and len(self._under_way) < supervisor.workers.steps_ahead:
                self._ask_for_step()
                due = self.asked == steps or self._is_due()
            if self._under_way:
                self._hear()
            if stopping := supervisor.stopping():
                self._end_where_all_have_been()
            commits = self.taken > self.committed and not self._under_way and (due or stopping)
            if commits:
                self._commit()
            while self._untold:
                supervisor.tell(self._untold.pop(0))
            if commits and not stopping and rounds.could_be_fairer(self.shares, steps - self.taken, loading_s):
                break
            if self.taken < steps:
                supervisor.stop_if_asked()
        supervisor.gather([self._ask(worker, "unload") for worker in self.shares])

    def _ask(self, worker: int, method: str, *args: Any) -> Any:
        return self.supervisor.workers.ask(worker, method, *args)

    def _is_due(self) -> bool:
        """Whether to commit before any other step is taken."""
        if self.asked == self.committed:
            return False
        step_s = (self._heard - self._began) / max(self.taken - self._first, 1)
        return self.rounds.is_due(self._heard - self._committed_at, step_s, self.asked - self.committed)

    def _ask_for_step(self) -> None:
        """Have all workers take another step: handles of border tiles go from worker to worker."""
        step, near = self.asked, self._near
        handed: dict[tuple[int, int], Any] = {}
        for worker, reaches in self._reaches.items():
            if reaches:
                handles = self.supervisor.workers.ask_for(len(reaches), worker, "border", step, reaches)
                handed |= {(worker, other): handle for other, handle in zip(near[worker], handles, strict=True)}
        for worker in near:
            self._ask(worker, "interior", step)
        ends = [self._ask(worker, "advance", step, *(handed[other, worker] for other in near[worker]))
                for worker in near]  # fmt: skip
        self._under_way.append(ends)
        self.asked += 1

    def _hear(self) -> list[Advanced]:
        """Wait for the end of the first step that is under way, and tell of it."""
        told: list[Advanced] = self.supervisor.gather(self._under_way[0], self._halt)
        self._under_way.popleft()
        reached = min(advanced.step for advanced in told)
        now = self.supervisor.clock()
        if reached > self.taken:
            for worker, advanced in zip(self.shares, told, strict=True):
                self.rounds.measured(worker, advanced.tiles, advanced.predicting_s)
            self.taken = reached
            tiles, predicting_s, sent_bytes = (sum(column) for column in [*zip(*told, strict=True)][1:])
            self._untold += [
                StepTaken(reached, now - self._heard, int(tiles), predicting_s, int(sent_bytes)),
                UnitsDone("sample", len(self.plan.canvas.blocks)),
            ]
        elif not self._halted and not self.supervisor.stopping():
            raise WorkerLost(f"step {self.taken + 1} was given up")
        self._heard = now
        return told

    def _halt(self) -> None:
        """Have the workers stop, once: a second time might find them at different steps."""
        if not self._halted:
            self._halted = True
            self.supervisor.workers.halt()

    def _end_where_all_have_been(self) -> None:
        self._halt()
        while self._under_way:
            self._hear()
        self.asked = self.taken

    def _commit(self) -> None:
        """Write x_t to the other slot, and seal it."""
        started, slot = self.supervisor.clock(), sample.other_slot(self.slot)
        self.rounds.store.unmark(f"sample/{self.layer}/{slot}")
        while True:
            try:
                written = self.supervisor.gather(
                    [self._ask(worker, "commit", slot, self.taken) for worker in self.shares]
                )
                self.rounds.seal(slot, self.taken, written, started)
                break
            except StoreFailed as refusal:  # what is in memory need not be computed again
                self.supervisor.be_patient(refusal)
        self.supervisor.is_served()
        self.slot, self.committed = slot, self.taken
        self._heard = self._committed_at = self.supervisor.clock()
        self.rounds.relax()

    def abandon(self) -> int:
        """Have nothing under way any more; how many steps were taken in vain."""
        self.supervisor.workers.give_up()
        for handle in [handle for ends in self._under_way for handle in ends]:
            with suppress(Exception):
                self.supervisor.gather([handle])
        return self.taken - self.committed
