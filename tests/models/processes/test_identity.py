"""What is compared between processes besides a command's settings."""

import importlib.metadata

import jax

from monarchrt.models.processes.identity import compilation, versions
from monarchrt.models.processes.service import difference


def test_flags_that_change_a_program():
    """Not those that say where something is written, or how many devices a process has."""

    def of(flags: str) -> dict[str, str]:
        return compilation({"XLA_FLAGS": flags})

    own = "--xla_dump_to=/tmp/0 --xla_force_host_platform_device_count=2 --xla_gpu_kernel_cache_file=a"
    assert of(f"{own} --xla_gpu_autotune_level=0") == of("--xla_gpu_autotune_level=0")
    wrong = difference(of("--xla_gpu_autotune_level=0"), of(own), process=1)
    assert wrong == "--xla_gpu_autotune_level in XLA_FLAGS is 0 in process 0 and None in process 1"
    assert difference(of("--xla_a"), of("--xla_a=true"), process=1) is None


def test_settings_of_jax():
    before, name = compilation({}), "jax_default_matmul_precision"
    with jax.default_matmul_precision("highest"):
        wrong = difference(before, compilation({}), process=1)
    assert wrong == f"{name} is {before[name]} in process 0 and highest in process 1"


def test_a_package_that_one_process_lacks(monkeypatch):
    """Such as the plugin for GPUs; and one of another version, such as of NumPy, by which data is put in order."""
    right, installed = versions(), importlib.metadata.version

    def version(name: str) -> str:
        if name == "jax-cuda13-plugin":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0" if name == "numpy" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert "version of jax-cuda13-plugin" not in found
    wrong = difference(right, {**right, "version of numpy": found["version of numpy"]}, process=1)
    assert wrong == f"version of numpy is {right['version of numpy']} in process 0 and 0 in process 1"
