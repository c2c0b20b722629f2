"""Faults of what is split over a mesh of devices and over processes, which `faults.py` has among its own."""

from tests.mutants.fault import Fault

MESH = ("tests/models/test_mesh.py",)
SPLIT = ("tests/models/attention/test_split_arrays.py",)
TRAINS = ("tests/train/test_sharding.py",)
PROCESSES = ("tests/models/processes",)
GATHERING = ("tests/train/test_gathering.py",)

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
    Fault("models/attention/explicit.py", 'cache.check_query(query, layer=where.get("layer"))', "pass", MESH, "known"),
    Fault(
        "models/attention/explicit.py",
        "inputs=make, ",
        "",
        SPLIT,
    ),
    Fault(
        "models/attention/base.py",
        "over_any_cache(cls.attend_cache, no_context=NO_CONTEXT)",
        "cls.attend_cache",
        SPLIT,
        "cache",
    ),
    Fault("models/attention/explicit.py", "whole = cache.of_arrays(", "(", SPLIT, "known"),
    Fault("models/attention/explicit.py", "x in (query, *parts) if", "x in (query,) if", SPLIT, "known"),
    Fault(
        "monarch_jax/partitioning.py",
        "rest = jax.tree.map(functools.partial(on",
        "jax.tree.map(functools.partial(on",
        SPLIT,
        "cache",
    ),
    Fault("models/sharding.py", "if mesh.size == 1:", "if not axes:", MESH, "address"),
    Fault("models/wan/tokens.py", "[own, got, own]", "[got, own, got]", TRAINS, "gradients"),
    Fault("models/wan/tokens.py", "_moved(gradient, not to_heads)", "gradient", TRAINS, "gradients"),
    Fault("models/compiling.py", "and len({device.process", "and not len({device.process", MESH, "halves"),
    # several processes
    Fault("models/processes/place.py", "tasks[node] if", "tasks[0] if", PROCESSES, "slurm"),
    Fault("models/processes/service.py", "dict.fromkeys((*right, *values))", "dict.fromkeys(right)", PROCESSES, "told"),
    Fault(
        "models/processes/agreement.py",
        "step >= self._last[0]",
        "step > self._last[0]",
        PROCESSES,
        "same_step",
    ),
    Fault("models/processes/identity.py", "if not _OWN.search(name)", "if _OWN.search(name)", PROCESSES, "flags"),
    # weights that are gathered a layer ahead
    Fault("models/compiling.py", "fsdp > 1 and not chosen and", "fsdp > 1 and", MESH, "layer_ahead"),
    Fault("train/step.py", "training.settings.accumulation == 1", "training.settings", GATHERING, "loops"),
    Fault("train/step.py", "whole and not objective.rolls_out and", "whole and", GATHERING, "loops"),
    Fault("train/gathering.py", "int(available * (1 - SPARE))", "available", GATHERING, "tenth"),
)
