"""`make mutants`: small faults, put into a copy of the project one at a time; the tests named beside each must fail.

    python -m tests.mutants [WORD ...]    # only faults whose file or text has one of the words

A fault that the tests do not notice is a gap in them. Prints a line for each, and ends with 1 if one went unnoticed.
"""

import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from tests.mutants.fault import Fault
from tests.mutants.faults import FAULTS

ROOT = pathlib.Path(__file__).parents[2]
AT_ONCE = 2  # faults, each in a copy of its own
UNNEEDED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "build", "dist", "*.egg-info", "results")


def noticed(fault: Fault, copy: pathlib.Path) -> str | None:
    """Which test of a fault fails with it in the copy, which is whole again afterwards; None if all pass."""
    path = copy / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.before, fault.after, 1))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
    if fault.only:
        command += ["-k", fault.only]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(copy.parent / "compiled"))  # most programs stay the same
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(text)
    if done.returncode not in (0, 1):  # no test ran
        raise SystemExit(f"{fault.file}: {' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+\.py\S*)", done.stdout, re.MULTILINE)
    return (failed[1] if failed else "a test") if done.returncode else None


def main(words: list[str]) -> int:
    """Tries the faults; the exit status."""
    chosen = [x for x in FAULTS if not words or any(word in f"{x.file} {x.before}" for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        copies = queue.SimpleQueue[pathlib.Path]()
        for number in range(AT_ONCE):
            copy = pathlib.Path(folder) / f"project{number}"
            shutil.copytree(ROOT, copy, symlinks=True, ignore=UNNEEDED)
            copies.put(copy)

        def tried(fault: Fault) -> bool:
            start, copy = time.perf_counter(), copies.get()
            test = noticed(fault, copy)
            copies.put(copy)
            taken = f"{time.perf_counter() - start:5.0f} s"
            place = f"{fault.file}: {fault.before.strip().splitlines()[0]}"
            print(f"noticed {taken}  {place}  by {test}" if test else f"MISSED  {taken}  {place}", flush=True)
            return test is not None

        missed = list(pool.map(tried, chosen)).count(False)
    print(f"{missed} of {len(chosen)} not noticed" if missed else f"all {len(chosen)} noticed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
