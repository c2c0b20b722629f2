"""Programs of tests on several CPU devices, of which a process cannot have more once JAX runs in it."""

import os
import subprocess
import sys


def on_devices(program: str, *arguments: str, count: int = 4) -> str:
    """What a program says, run in a process of its own with so many devices; it must end well."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
