"""For all tests: small models on few cores run fastest on one thread; nothing is ever asked of a model hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
