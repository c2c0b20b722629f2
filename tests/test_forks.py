"""What is forked is a process of its own: its exit, signals, streams, environment, folder and devices."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).parent.parent


def start(program, *arguments, folder, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    return forks.start(program, arguments, environment=environment, folder=folder, imports=("jax",))


def test_what_it_is_given_and_what_it_says(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=3"
    program = "import jax, os, sys; print(sys.argv[1:], os.getcwd(), jax.device_count()); sys.exit('no')"
    process = start(program, "a", "b c", folder=tmp_path, XLA_FLAGS=flags)
    assert process.communicate(timeout=120) == (f"['a', 'b c'] {tmp_path} 3\n", "no\n")
    assert process.returncode == process.poll() == 1
    process = start("import os, sys; sys.stderr.write('e' * 200_000); os._exit(7)", folder=tmp_path)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("e" * 200_000, 7)  # more than a pipe holds


def test_how_it_is_ended(tmp_path):
    sleep = "import time; print('here', flush=True); time.sleep(300)"
    one, other = (start(sleep, folder=tmp_path) for _ in range(2))
    for process, number, code in ((one, signal.SIGKILL, -9), (other, signal.SIGINT, -2)):
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
        assert (process.returncode, "KeyboardInterrupt" in errors) == (code, number == signal.SIGINT)
        process.kill()  # which does nothing now
