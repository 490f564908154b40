"""Ray that starts for a test module, of several machines as far as Ray can tell, and ends with it."""

import gc
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it on import

ray = pytest.importorskip("ray")


SOON_MISSED = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 3000,
               "health_check_failure_threshold": 3}  # fmt: skip
"""A machine that is lost is noticed after three seconds instead of fifteen."""


class Machines:
    """A head without cores, and machines with one core each; all of them processes of this machine."""

    def __init__(self, n: int) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={**self._arguments(0), "_system_config": SOON_MISSED}
        )
        self._nodes: list[Any] = []
        self.complete(n)

    @staticmethod
    def _arguments(cores: int) -> dict[str, Any]:
        return {"num_cpus": cores, "object_store_memory": 2**27, "include_dashboard": False}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def lose_one(self) -> None:
        """SIGKILL of everything on a machine."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def complete(self, n: int = 2) -> None:
        """So many machines."""
        while len(self._nodes) < n:
            self._nodes.append(self._cluster.add_node(**self._arguments(1)))

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """One of them, in the beginning."""
    made = Machines(1)
    try:
        yield made
    finally:
        made.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves pipes open; not to be blamed on a later test
            gc.collect()


@pytest.fixture
def connected(machines: Machines) -> Iterator[Machines]:
    """This process as a driver on two of them."""
    machines.complete()
    ray.init(address=machines.address, log_to_driver=False, logging_level="WARNING")
    try:
        yield machines
    finally:
        ray.shutdown()
