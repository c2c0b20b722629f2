"""Which process of a run this is, from options or from a job manager. Does not import JAX."""

import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from monarchrt.models.errors import UserError

PORT_VARIABLE = "JAX_COORDINATOR_PORT"
_EXAMPLE = "10.0.0.1:1234"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes of a run this is.

    Attributes:
        coordinator: Address and port of process 0, HOST:PORT; IPv6 addresses in brackets.
        processes: Number of processes.
        process: Index of this process, from 0.
        devices: Indices of the GPUs that it uses, among those visible to it; None for all.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """Host of the coordinator, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of the coordinator."""
        return int(self.coordinator.rpartition(":")[2])


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a job manager says about this process; fields as in `Place`, None if it does not say."""

    name: str
    processes: int
    process: int
    coordinator: str | None
    devices: tuple[int, ...] | None


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process, from options and, for what they leave out, from Slurm's srun or Open MPI's mpirun.

    Args:
        coordinator: Address and port of process 0, HOST:PORT.
        processes: Number of processes.
        process: Index of this process, from 0.
        environment: Environment variables of the process.

    Returns:
        The place; None if there is no option and no job manager, or the only option is `processes=1`.

    Raises:
        UserError: If a value is missing or out of range.

    Examples:
        >>> find_place(environment={}) is None
        True
        >>> slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        ...          "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
        >>> find_place(environment=slurm)
        Place(coordinator='gpu03:61447', processes=4, process=3, devices=(1,))
    """
    check_options(coordinator, processes, process)
    job = next((place for read in _MANAGERS if (place := read(environment))), None)
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    named = [name for name, value in given.items() if value is not None]
    if (named == ["processes"] and processes == 1) or (job is None and not named):
        return None
    if job is not None:
        given = {name: getattr(job, name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in given.items() if value is None]
    if missing == ["coordinator"] and job is not None:
        raise UserError(
            f"coordinator is not given, and {job.name} does not say where process 0 of {job.processes} runs; give "
            f"--coordinator HOST:PORT, its host and a free port"
        )
    if missing:
        raise UserError(
            f"{named[0]} is {given[named[0]]}, which goes with {' and '.join(missing)}; give all three, or start the "
            f"processes with srun or mpirun"
        )
    check_options(given["coordinator"], given["processes"], given["process"])
    return Place(**given, devices=None if job is None else job.devices)  # type: ignore[arg-type]


def check_options(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Raises UserError for an option that is invalid regardless of the job manager."""
    if coordinator is not None:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise UserError(
                f"coordinator is {coordinator!r}; it must be the address of process 0 and a port, such as {_EXAMPLE}"
            )
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            bracketed = f"[{host.strip('[]')}]:{port}"
            raise UserError(
                f"coordinator is {coordinator!r}; write an address of IPv6 in brackets, such as {bracketed}"
            )
    if processes is not None and processes < 1:
        raise UserError(f"processes is {processes}; it must be at least 1")
    if process is not None and process < 0:
        raise UserError(f"process is {process}; it must be at least 0")
    if processes is not None and process is not None and process >= processes:
        raise UserError(
            f"process is {process}; it must lie in 0...{processes - 1}, as processes is {processes} and they are "
            f"counted from 0"
        )


def _slurm(environment: Mapping[str, str]) -> _Job | None:
    """A step of srun; None outside of one, as in a batch script itself."""
    count = _count(environment, "SLURM_STEP_NUM_TASKS")
    process, job = _count(environment, "SLURM_PROCID"), _count(environment, "SLURM_JOB_ID")
    if count is None or count < 2 or process is None or job is None:
        return None
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", environment.get("SLURM_STEP_NODELIST", ""))
    host = "".join(part or "" for part in match.groups()) if match else None
    tasks = [int(times) for times in _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))]
    node = _count(environment, "SLURM_NODEID") or 0
    return _Job(
        name="Slurm",
        processes=count,
        process=process,
        coordinator=host and f"{host}:{_port(environment, job + (_count(environment, 'SLURM_STEP_ID') or 0))}",
        devices=device_share(
            _count(environment, "SLURM_LOCALID") or 0,
            tasks[node] if node < len(tasks) else 1,
            visible=environment.get("CUDA_VISIBLE_DEVICES"),
            on_node=_count(environment, "SLURM_GPUS_ON_NODE"),
        ),
    )


def _open_mpi(environment: Mapping[str, str]) -> _Job | None:
    count, process = (_count(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count is None or count < 2 or process is None:
        return None
    together = _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    # version 4 names the machine of mpirun, 5 none
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    host = "localhost" if together == count else None if match is None else match[1] or f"[{match[2]}]"
    name = environment.get("PMIX_NAMESPACE") or uri.partition(".")[0] or "0"
    return _Job(
        name="Open MPI",
        processes=count,
        process=process,
        coordinator=host and f"{host}:{_port(environment, zlib.crc32(name.encode()))}",
        devices=device_share(
            _count(environment, "OMPI_COMM_WORLD_LOCAL_RANK") or 0,
            together,
            visible=environment.get("CUDA_VISIBLE_DEVICES"),
        ),
    )


# read in this order; each returns None if its job manager did not start this process
_MANAGERS: tuple[Callable[[Mapping[str, str]], _Job | None], ...] = (_slurm, _open_mpi)


def device_share(
    process: int, processes: int, *, visible: str | None, on_node: int | None = None
) -> tuple[int, ...] | None:
    """The GPUs that a process uses if several processes run on one machine.

    Args:
        process: Index of the process among those on this machine.
        processes: Number of processes on this machine.
        visible: CUDA_VISIBLE_DEVICES; None if it is not set.
        on_node: Number of GPUs that the job has on this machine; None if unknown.

    Returns:
        Indices among the visible GPUs; None for all of them, if there is one process or each already has its own.

    Examples:
        >>> device_share(1, 2, visible="0,1,2,3"), device_share(1, 2, visible="2,3", on_node=4)
        ((2, 3), None)
        >>> device_share(0, 1, visible=None), device_share(1, 2, visible=None)
        (None, (1,))
    """
    if processes == 1:
        return None
    if visible is None:
        return (process,)
    seen = len([name for name in visible.split(",") if name.strip()])
    bound = on_node is not None and seen < on_node
    if bound or seen < processes:
        return None
    share = seen // processes
    return tuple(range(process * share, (process + 1) * share))


def _tasks_per_node(text: str) -> list[str]:
    """Expands Slurm's notation: `2(x3),1` is 2, 2, 2, 1."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [count for count, times in groups for _ in range(int(times or 1))]


def _count(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def _port(environment: Mapping[str, str], job: int) -> int:
    """A port that all processes of a job derive alike from its number; from the top of the dynamic range."""
    if (text := environment.get(PORT_VARIABLE)) is not None:
        port = _count(environment, PORT_VARIABLE)
        if port is None or not 0 < port < 2**16:
            raise UserError(f"{PORT_VARIABLE} is {text!r}; it must be a port, 1...65535")
        return port
    return 2**16 - 2**12 + job % (2**12 - 1)
