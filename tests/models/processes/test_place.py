"""Which process this is: options, what Slurm and Open MPI say, and which GPUs it takes."""

import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.processes.place import Place, device_share, find_place

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008,11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def test_one_process_has_no_place():
    assert find_place(environment={}) is None
    for alone in ({"SLURM_STEP_NUM_TASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_NTASKS": "8"}):
        assert find_place(environment=SLURM | {"SLURM_STEP_NUM_TASKS": "1"} | alone) is None  # or a batch script


def test_one_of_a_job_may_be_alone():
    assert find_place(processes=1, environment=SLURM) is None


def test_options_alone():
    found = find_place("10.0.0.1:1234", 2, 1, environment={})
    assert found == Place(coordinator="10.0.0.1:1234", processes=2, process=1)
    assert found is not None
    assert (found.host, found.port) == ("10.0.0.1", 1234)
    ipv6 = find_place("[fe80::1]:1234", 1, 0, environment={})
    assert ipv6 is not None
    assert (ipv6.host, ipv6.port) == ("fe80::1", 1234)


def test_slurm():
    found = find_place(environment=SLURM)
    assert found is not None
    assert (found.host, found.processes, found.process, found.devices) == ("gpu007", 6, 4, (0,))
    others = [find_place(environment=SLURM | {"SLURM_PROCID": str(n)}) for n in range(6)]
    assert {other.port for other in others if other} == {found.port}  # all of a job, without asking
    later = find_place(environment=SLURM | {"SLURM_STEP_ID": "3"})
    assert later is not None
    assert later.port != found.port
    # the last of three machines has one process, which takes all of its GPUs
    last = find_place(environment=SLURM | {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"})
    assert last is not None
    assert last.devices is None


@pytest.mark.parametrize(
    ("nodes", "host"), [("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("a-b[3,7],c", "a-b3"), ("gpu[09-12]", "gpu09")]
)
def test_the_first_machine_of_slurm(nodes, host):
    found = find_place(environment=SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.host == host


def test_one_process_for_all_devices_of_a_machine():
    """By default JAX takes one device each under Slurm, however many there are."""
    found = find_place(environment=SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x6)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert found is not None
    assert found.devices is None


def test_open_mpi():
    found = find_place(environment=OPEN_MPI)
    assert found is not None
    assert (found.host, found.processes, found.process, found.devices) == ("10.96.0.1", 4, 3, (1,))
    near = {name: value for name, value in OPEN_MPI.items() if "uri" not in name} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    here = find_place(environment=near | {"PMIX_NAMESPACE": "prterun-node-77@1"})
    assert here is not None
    assert here.host == "localhost"


def test_open_mpi_5_on_several_machines_needs_an_address():
    far = {name: value for name, value in OPEN_MPI.items() if "uri" not in name}
    with pytest.raises(UserError, match="Open MPI does not say where process 0 of 4 runs"):
        find_place(environment=far)
    found = find_place("node1:4000", environment=far)
    assert found == Place(coordinator="node1:4000", processes=4, process=3, devices=(1,))


def test_options_go_before_the_job_manager():
    found = find_place("node9:77", 3, environment=SLURM | {"SLURM_PROCID": "2"})
    assert found is not None
    assert (found.coordinator, found.processes, found.process) == ("node9:77", 3, 2)


def test_a_port_from_the_environment():
    found = find_place(environment=SLURM | {"JAX_COORDINATOR_PORT": "5000"})
    assert found is not None
    assert found.port == 5000
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_PORT is 'x'; it must be a port, 1\.\.\.65535"):
        find_place(environment=SLURM | {"JAX_COORDINATOR_PORT": "x"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, 2, 1), "processes is 2, which goes with coordinator; give all three"),
        (("a:1", None, None), "coordinator is a:1, which goes with processes and process; give all three"),
        ((None, None, 0), "process is 0, which goes with coordinator and processes"),
        (("a:1", 2, 2), r"process is 2; it must lie in 0\.\.\.1, as processes is 2"),
        (("a:1", 2, -1), "process is -1; it must be at least 0"),
        (("a:1", 0, 0), "processes is 0; it must be at least 1"),
        (("a", 2, 0), "coordinator is 'a'; it must be the address of process 0 and a port"),
        (
            ("fe80::1:1234", 2, 0),
            r"coordinator is 'fe80::1:1234'; write an address of IPv6 in brackets, such as \[fe80::1\]:1234",
        ),
        ((":1", 2, 0), "coordinator is ':1'; it must be"),
        (("a:0", 2, 0), "coordinator is 'a:0'; it must be"),
        (("a:65536", 2, 0), "it must be"),
        (("a:٣", 2, 0), "it must be"),
        (("", 2, 0), "it must be"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        find_place(*options, environment={})


def test_an_index_that_the_job_manager_does_not_know():
    with pytest.raises(UserError, match="process is 4; it must lie in"):
        find_place(None, 3, None, environment=SLURM)


@pytest.mark.parametrize(
    ("local", "visible", "on_node", "devices"),
    [
        ((0, 1), None, None, None),
        ((1, 4), None, None, (1,)),
        ((1, 4), "0,1,2,3", None, (1,)),
        ((3, 4), "0,1,2,3,4,5,6,7", 8, (6, 7)),
        ((3, 4), "6,7", 8, None),  # each was given its own
        ((1, 2), "GPU-5", None, None),
        ((0, 2), "", None, None),
    ],
)
def test_which_devices(local, visible, on_node, devices):
    assert device_share(*local, visible=visible, on_node=on_node) == devices
