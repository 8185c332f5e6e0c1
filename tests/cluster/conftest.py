"""One Ray for the tests of this floor that build in this process."""

from collections.abc import Iterator

import pytest

from capstan.pipeline.config import Resources


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Resources]:
    """Start Ray on two logical CPUs; yield the resources to run with."""
    import ray

    from capstan.pipeline.units import start_ray

    resources = Resources(cpus=2)
    start_ray(resources)
    yield resources
    ray.shutdown()
