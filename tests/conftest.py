"""For all tests: small models on few cores run fastest on one thread; nothing is ever asked of a model hub."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a model does use more, they sleep when there is nothing to do: turning in circles they took six times the CPU
# seconds of their work, out of what other tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
# Children would inherit what a shell's background jobs and nohup ignore.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _small_runs_need_no_ray() -> None:
    """Run on Ray only what asks for it, also after a test of this process has started Ray: it is far slower."""
    from capstan.pipeline import units

    units.ray_runs_here = lambda: False
