"""Memory: what a device has, and what a compiled program takes on each, also on devices that are not there."""

import os
from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
        arguments: What it is given.
        results: What it returns, less what lies where an argument was.
        temporary: What it needs meanwhile.
        code: The program itself.
    """

    arguments: int
    results: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        """All of it: the most that is held at a time."""
        return sum(self)


def reported(program: Any) -> Memory | None:
    """The memory of a compiled program, as `memory`; None where the backend's compiler says nothing of it."""
    try:
        analysis = program.memory_analysis()
    except NotImplementedError:
        return None
    return None if analysis is None else _taken(analysis)


def device_memory(device: Any) -> int:
    """Bytes that arrays on a device can take: on a CPU its share of the machine's memory, if several stand for it.

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
        program: Of `jax.jit(f).lower(...).compile()`; of a mesh, the figures are those of each device.

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
    """Bytes in three digits, such as 1.42 GiB; - for none.

    Examples:
        >>> shown(3 * 2**29), shown(0)
        ('1.5 GiB', '-')
    """
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} B" if count else "-"
