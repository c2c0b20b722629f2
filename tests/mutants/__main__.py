"""`make mutants`: small faults, put into a copy of the project one at a time; the tests named beside each must fail.

    python -m tests.mutants [WORD ...]    # only faults whose file or text has one of the words

A fault that the tests do not notice is a gap in them. Prints a line for each, and ends with 1 if one went unnoticed.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutants.faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).parents[2]
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
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "project"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=UNNEEDED)
        for fault in FAULTS:
            if words and not any(word in f"{fault.file} {fault.before}" for word in words):
                continue
            start = time.perf_counter()
            test = noticed(fault, copy)
            missed += [] if test else [fault]
            taken = f"{time.perf_counter() - start:5.0f} s"
            place = f"{fault.file}: {fault.before.strip().splitlines()[0]}"
            print(f"noticed {taken}  {place}  by {test}" if test else f"MISSED  {taken}  {place}", flush=True)
    print(f"{len(missed)} not noticed" if missed else "all noticed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
