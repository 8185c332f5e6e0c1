"""Fuzz what reads strangers' files: tars, images, URLs, robots.txt, recipes.

    python benchmarks/fuzz.py [TARGET …] [--seconds 600] [--corpus FOLDER …] [--findings build/fuzz]     (make fuzz)

The targets are in tests/helpers/fuzz_targets. atheris (libFuzzer) changes their seeds, guided by the lines of Capstan
that run; each target is a process of its own. A finding is whatever is raised but a typed reason, more than one second
of CPU time for an input, or 512 MB more than the process had after reading its seeds. Each finding is written to a
file, and the target goes on; `python benchmarks/fuzz.py TARGET --replay FILE` reads one again.

Worst time: CPU seconds of the slowest input. Worst memory: what the process grew by, all inputs together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

MOST_CPU_S = 1.0
MOST_BYTES = 512_000_000
_STUCK_S = 120  # wall-clock; libFuzzer then ends the process
_SAVED_EVERY = 0.5  # seconds between two writings of the counts
_CRASHES = ("crash-", "timeout-", "oom-", "leak-")


def main() -> None:
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=600, help="per target")
    parser.add_argument("--corpus", type=Path, nargs="*", default=[ROOT / "examples"], help="folders of more seeds")
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz", help="where inputs are written")
    parser.add_argument("--replay", type=Path, help="read one input of one target")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the folder of a target's process
    arguments = parser.parse_args()
    if arguments.replay:
        sys.exit(_replay(arguments.targets[0], arguments.replay.read_bytes()))
    if arguments.child:
        _fuzz(arguments.targets[0], arguments.child, arguments.seconds, arguments.findings)
        return
    arguments.findings.mkdir(parents=True, exist_ok=True)
    print("| target | inputs | seconds | worst time, s | worst memory, MB | findings |")
    print("|---|---|---|---|---|---|", flush=True)
    found = 0
    for name in arguments.targets:
        total = _run(name, arguments.seconds, arguments.corpus, arguments.findings)
        found += len(total["findings"])
        line = (
            f"{name} | {total['inputs']:,} | {total['seconds']:.0f} | {total['cpu_s']:.2f} | {total['bytes'] / 1e6:.0f}"
        )
        print(f"| {line} | {len(total['findings'])} |", flush=True)
        for finding, file in total["findings"].items():
            print(f"{name}: {finding}: {file}", file=sys.stderr, flush=True)
    sys.exit(1 if found else 0)


def _run(name: str, seconds: int, corpus: list[Path], findings: Path) -> dict[str, Any]:
    """Fuzz one target for the given time, in a new process whenever one has died. Return its counts."""
    total: dict[str, Any] = {"inputs": 0, "seconds": 0.0, "cpu_s": 0.0, "bytes": 0, "findings": {}}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _write_seeds(name, work / "corpus", corpus)
        while (left := int(end - time.monotonic())) > 0:
            command = [sys.executable, __file__, name, "--child", str(work), "--seconds", str(left)]
            with (work / "log").open("wb") as log:
                command += ["--findings", str(findings)]
                done = subprocess.run(command, cwd=work, stdout=log, stderr=log, check=False)
            counts = json.loads((work / "counts.json").read_text()) if (work / "counts.json").exists() else {}
            for key in ("inputs", "seconds"):
                total[key] += counts.get(key, 0)
            for key in ("cpu_s", "bytes"):
                total[key] = max(total[key], counts.get(key, 0))
            total["findings"] |= counts.get("findings", {})
            died = [file for file in work.iterdir() if file.name.startswith(_CRASHES)]
            for file in died:
                kept = findings / f"{name}-{file.name}"
                kept.write_bytes(file.read_bytes())
                total["findings"][f"the process ended ({file.name.partition('-')[0]})"] = str(kept)
                file.unlink()
            if done.returncode and not died:
                sys.exit(f"{name}: the process failed\n{(work / 'log').read_text(errors='replace')[-3000:]}")
    return total


def _write_seeds(name: str, folder: Path, more: list[Path]) -> None:
    import fuzz_targets

    target = fuzz_targets.load(name)
    files = [path for top in more for path in sorted(top.rglob("*")) if path.suffix.lower() in target.SUFFIXES]
    folder.mkdir()
    for data in [*target.seeds(), *(path.read_bytes() for path in files)]:
        if len(data) <= target.LONGEST:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.WORDS)
    (folder.parent / "words").write_text("".join(f'"{word}"\n' for word in words))


def _fuzz(name: str, work: Path, seconds: int, findings: Path) -> None:
    """Fuzz in this process until the time is over."""
    import atheris

    with atheris.instrument_imports(include=["capstan", "yaml", "yarl"], enable_loader_override=False):
        import fuzz_targets

        target = fuzz_targets.load(name)
        for seed in sorted((work / "corpus").iterdir()):
            _quietly(target, seed.read_bytes())
    watch = _Watch(name, target, work / "counts.json", findings)
    options = [f"-max_total_time={seconds}", f"-timeout={_STUCK_S}", f"-max_len={target.LONGEST}", "-dict=words"]
    options += [f"-rss_limit_mb={(watch.before + MOST_BYTES) >> 20}", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(work / "corpus")], watch.read)
    atheris.Fuzz()


def _quietly(target: Any, data: bytes) -> None:
    try:
        target.check(data)
    except Exception:  # noqa: BLE001 - will be found again, and noted, when fuzzing begins
        return


class _Watch:
    """Reads inputs, and notes what they cost and which findings they are."""

    def __init__(self, name: str, target: Any, counts: Path, findings: Path) -> None:
        self._name, self._target, self._file, self._folder = name, target, counts, findings
        self._start = self._saved = time.monotonic()
        self._counts: dict[str, Any] = {"inputs": 0, "seconds": 0.0, "cpu_s": 0.0, "bytes": 0, "findings": {}}
        self.before = _peak()

    def read(self, data: bytes) -> None:
        start = time.thread_time()
        try:
            self._target.check(data)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            self._note(_kind_of(error), data)
        spent = time.thread_time() - start
        counts = self._counts
        counts["inputs"] += 1
        counts["cpu_s"] = max(counts["cpu_s"], spent)
        counts["bytes"] = max(counts["bytes"], _peak() - self.before)
        if spent > MOST_CPU_S:
            self._note(f"{spent:.0f} s of CPU time" if spent > 2 else "more than a second of CPU time", data)
        if time.monotonic() - self._saved > _SAVED_EVERY:
            self._saved = time.monotonic()
            counts["seconds"] = self._saved - self._start
            self._file.write_text(json.dumps(counts))

    def _note(self, kind: str, data: bytes) -> None:
        if kind not in self._counts["findings"]:
            file = self._folder / f"{self._name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
            file.write_bytes(data)
            self._counts["findings"][kind] = str(file)
            self._file.write_text(json.dumps(self._counts))


def _kind_of(error: Exception) -> str:
    """Return an error's type and the line of ours that it came through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "capstan" in frame.filename]
    where = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _replay(name: str, data: bytes) -> int:
    import fuzz_targets

    signal.alarm(10 * _STUCK_S)
    target, start, before = fuzz_targets.load(name), time.process_time(), _peak()
    target.check(data)
    print(f"{time.process_time() - start:.2f} s, {(_peak() - before) / 1e6:.0f} MB, nothing raised")
    return 0


if __name__ == "__main__":
    main()
