"""Where JAX's CUDA plugin is installed without a driver, commands run on the CPU in silence; others are left alone."""

import subprocess
import sys

import pytest

from monarchrt.train.cli import platform

from .conftest import ROOT


@pytest.mark.parametrize(
    ("plugins", "device", "given", "expected"),
    [
        ({"xla_cuda13"}, None, {}, {"JAX_PLATFORMS": "cpu"}),
        ({"xla_cuda13"}, "dev/nvidiactl", {}, {}),
        ({"xla_cuda13"}, "dev/dxg", {}, {}),  # Windows' Linux
        ({"xla_cuda13"}, "dev/accel0", {}, {}),  # a TPU
        ({"xla_cuda13"}, None, {"JAX_PLATFORMS": ""}, {"JAX_PLATFORMS": ""}),
        ({"xla_cuda13"}, None, {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "cuda"}),
        ({"xla_cuda13", "metal_plugin"}, None, {}, {}),
        ({"metal_plugin"}, None, {}, {}),
        (set(), None, {}, {}),
    ],
)
def test_only_a_plugin_that_cannot_work_is_left_out(tmp_path, monkeypatch, plugins, device, given, expected):
    monkeypatch.setattr(platform, "installed_plugins", lambda: plugins)
    if device:
        (tmp_path / device).parent.mkdir(parents=True)
        (tmp_path / device).touch()
    environment = dict(given)
    platform.leave_out_cuda(environment, root=tmp_path)
    assert environment == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cuda", "cuda,cpu"),  # progress and captured maps are handed to the host through a CPU device
        ("cuda,", "cuda,cpu"),
        ("cuda,cpu", "cuda,cpu"),
        ("cpu", "cpu"),
        ("cpu,cuda", "cpu,cuda"),
        ("", ""),
        (None, None),
    ],
)
def test_a_cpu_is_there_beside_a_gpu(given, expected):
    environment = {} if given is None else {"JAX_PLATFORMS": given}
    platform.keep_cpu(environment)
    assert environment.get("JAX_PLATFORMS") == expected


@pytest.mark.skipif(not any("cuda" in name for name in platform.installed_plugins()), reason="no CUDA plugin here")
def test_a_command_is_silent(environment):
    program = (
        "import sys; from monarchrt.train.cli import main\n"
        "try:\n  main(['demo', '--help'])\nexcept SystemExit: pass\n"
        "import jax; jax.devices()"
    )
    bare = {name: value for name, value in environment.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", program], env=bare, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
