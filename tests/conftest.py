"""For all tests: small models on few cores run fastest on one thread; nothing is ever asked of a model hub."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs: children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
