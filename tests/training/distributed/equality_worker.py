"""One worker of test_equality: trains the runs of a list, each in a process group of its own.

Usage: equality_worker.py JOBS. JOBS is a JSON list of {port, recipe}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from capstan.pipeline.config import Recipe
from capstan.training.trainer import fit


def main(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        os.environ |= {"MASTER_PORT": str(job["port"]), "LOCAL_RANK": os.environ["RANK"]}
        fit(Recipe(**job["recipe"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
