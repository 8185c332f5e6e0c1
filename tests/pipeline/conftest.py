"""One Ray for all tests of this floor: starting it takes about 4 s."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Resources
from pipeline.storage import Storage

TWO_CPUS = Resources(cpus=2)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Resources]:
    """Ray on two logical CPUs; gives the resources to run with."""
    import ray

    from pipeline.units import start_ray

    start_ray(TWO_CPUS)
    yield TWO_CPUS
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty dataset folder."""
    return Storage(str(tmp_path / "dataset"))


@pytest.fixture(scope="session")
def die():
    """Ends the calling process at once, as the kernel does when memory is out."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return kill
