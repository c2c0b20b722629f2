"""Memory of devices and of compiled programs, also of programs compiled for devices that are not present."""

import os
from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Bytes that a program needs on one device.

    Attributes:
        arguments: Its arguments.
        results: Its results, without those that reuse the memory of donated arguments.
        temporary: Its temporary buffers.
        code: Its code.
    """

    arguments: int
    results: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        """The sum, which is the peak."""
        return sum(self)

    @property
    def arrays(self) -> int:
        """The sum without the code."""
        return self.total - self.code


def reported(program: Any) -> Memory | None:
    """As `memory`, but None if the backend's compiler does not report it."""
    try:
        analysis = program.memory_analysis()
    except NotImplementedError:
        return None
    return None if analysis is None else _taken(analysis)


def device_memory(device: Any) -> int:
    """Bytes available to arrays on a device; for a CPU device, the machine's memory divided among its CPU devices.

    Examples:
        >>> import jax
        >>> device_memory(jax.devices()[0]) > 2**20
        True
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return limit
    sharing = len(device.client.local_devices()) if device.platform == "cpu" else 1
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // sharing


def memory(program: Any) -> Memory:
    """The memory of a compiled program.

    Args:
        program: The result of `jax.jit(f).lower(...).compile()`.

    Returns:
        Bytes on each device.

    Examples:
        >>> import jax
        >>> memory(jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((256,), "float32")).compile()).arguments
        1024
    """
    return _taken(program.memory_analysis())


def _taken(analysis: Any) -> Memory:
    return Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
    )


def shown(count: int) -> str:
    """Formats bytes with three digits, such as 1.42 GiB; "-" for 0.

    Examples:
        >>> shown(3 * 2**29), shown(0)
        ('1.5 GiB', '-')
    """
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} B" if count else "-"
