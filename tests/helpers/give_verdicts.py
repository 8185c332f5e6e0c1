"""Review a dataset in `capstan view` as a person would: one verdict after the other. Run as a program.

    python give_verdicts.py DATASET [--set storage.KEY=VALUE ...]

Ends with 0 once every row has a verdict, with 1 and one line if the viewer refuses one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

LIMIT_S = 300


def main() -> int:
    command = [sys.executable, "-m", "capstan", "view", sys.argv[1], "--no-browser", "--json", *sys.argv[2:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        try:
            first = viewer.stdout.readline()
            return review(json.loads(first)["url"]) if first else viewer.wait()
        except urllib.error.HTTPError as error:  # also a question that takes too long
            print("error:", " ".join(error.read().decode().split()), file=sys.stderr)
            return 1
        finally:
            viewer.terminate()


def review(url: str) -> int:
    origin, _, query = url.partition("/?")
    cookie = {"Cookie": f"capstan-view={query.removeprefix('token=')}"}
    rows = sorted(row["key"] for row in ask(f"{origin}/api/rows", cookie)["rows"])
    for number, key in enumerate(rows):
        body = {"verdicts": [{"key": key, "verdict": ("keep", "reject")[number % 2]}]}
        ask(f"{origin}/api/review/mine", cookie | {"X-Capstan": "1", "Content-Type": "application/json"}, body)
    return 0


def ask(url: str, headers: dict[str, str], body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=LIMIT_S) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    sys.exit(main())
