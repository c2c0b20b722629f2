"""Faults of what is split over a mesh of devices, which `faults.py` has among its own."""

from tests.mutants.fault import Fault

MESH = ("tests/models/test_mesh.py",)

MESHES = (
    Fault("models/sharding.py", "not any(map(_gathers, steps)) and any", "any", MESH, "residuals"),
    Fault(
        "models/attention/monarch.py",
        "return on_each_device(attend, None, arrays, (BY",
        "return attend(None, *arrays) if arrays else on_each_device(attend, None, arrays, (BY",
        MESH,
        "address",
    ),
    Fault(
        "models/attention/listed.py",
        "return on_each_device(attend, None, (query, key, value, *parts)",
        "return attend(None, query, key, value, *parts) if parts else on_each_device(attend, None, (query, key, value)",
        MESH,
        "address",
    ),
    Fault("models/attention/monarch.py", "cache.check_query(query, layer=layer)", "pass", MESH, "known"),
    Fault(
        "models/attention/explicit.py",
        "inputs=make, ",
        "",
        ("tests/models/attention/test_split_arrays.py",),
    ),
    Fault("models/sharding.py", "if mesh.size == 1:", "if not axes:", MESH, "address"),
)
