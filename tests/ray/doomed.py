"""`gigasr`, but it is killed at a given moment: `python -m tests.ray.doomed MOMENT N DELAY upscale ...`.

MOMENT is a method that workers are asked for, or "export"; at the Nth time, DELAY seconds later, comes SIGKILL.
"""

import os
import signal
import sys
import threading
from typing import Any

from pipeline import cli
from pipeline.events import Event, UnitsDone
from pipeline.ray_workers import RayWorkers
from pipeline.supervisor import Supervisor


def main() -> None:
    moment, n, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    del sys.argv[1:4]
    seen = 0

    def notice(what: str) -> None:
        nonlocal seen
        seen += what == moment
        if what == moment and seen == n:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    ask, tell = RayWorkers.ask, Supervisor.tell

    def noticed_ask(workers: RayWorkers, worker: int, method: str, *args: Any) -> Any:
        notice(method)
        return ask(workers, worker, method, *args)

    def noticed_tell(supervisor: Supervisor, event: Event) -> None:
        if isinstance(event, UnitsDone) and event.stage == "export":
            notice("export")
        tell(supervisor, event)

    RayWorkers.ask = noticed_ask  # type: ignore[method-assign]
    Supervisor.tell = noticed_tell  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    main()
