"""Training steps of a Wan network on meshes of this machine's devices, against one of them: one command, one report.

    python benchmarks/scale.py --meshes data=1 data=4 fsdp=4 heads=4 data=2,heads=2 --out scale.json

Before anything is timed, a small network must have the loss and the gradient of one device on every mesh. Each device
has a clip of its own, those of an axis heads one together; "rate" is clips a second for each device, against one
device's. Collectives are read from the compiled program, the memory is what its compiler planned.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import use_abstract_mesh

from monarchrt.models.attention.notation import parse
from monarchrt.models.collectives import collectives, summary
from monarchrt.models.memory import memory
from monarchrt.models.mesh import MeshShape
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train.config import ObjectiveConfig, OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.sharding import Placement
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step


def check(meshes):
    """Exits unless a small network has the loss and the gradient of one device on every mesh."""
    config = wan_config("tiny", dim=192, ffn_dim=384, num_heads=12, num_layers=2, text_dim=64, text_len=8)
    graph, params = nnx.split(WanModel(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    batch = math.lcm(*(mesh.batch_parts for mesh in meshes))
    latents = np.random.default_rng(0).normal(size=(batch, 2, 8, 24, 16)).astype(np.float32)
    text, times = np.ones((batch, 8, 64), np.float32), np.linspace(100, 900, batch, dtype=np.float32)

    def found(mesh):
        placement = Placement(batch=batch, mesh=str(mesh), devices=jax.devices()[: mesh.size])

        def loss(params, latents, times, text):
            with use_abstract_mesh(placement.mesh.abstract_mesh):
                return (nnx.merge(graph, params)(latents, times, text) * latents).mean()

        own = jax.device_put(params, placement.shardings(params))
        with jax.default_matmul_precision("highest"):
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(own, *placement.batch((latents, times, text))))

    right = found(MeshShape())
    for mesh in meshes:
        for x, y in zip(jax.tree.leaves(found(mesh)), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5, err_msg=f"mesh {mesh}")


def measure(mesh, options):
    """One row of the report."""
    config = wan_config(
        options.preset, attention=parse(options.attention), dtype="bfloat16", param_dtype=options.state, remat="full"
    )
    objective = make_objective(ObjectiveConfig())
    training = make_training(OptimizerConfig(ema_decay=None), updates=options.steps)
    batch = mesh.batch_parts * options.clips
    placement = Placement(batch=batch, mesh=str(mesh), devices=jax.devices()[: mesh.size])
    graph = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))[0]

    def create():
        params, fixed = split_model(WanModel(config, rngs=nnx.Rngs(0)))[1:]
        return create_state({"student": create_role(params, fixed, training)}, seed=0)

    shardings = placement.shardings(jax.eval_shape(create))
    state = jax.jit(create, out_shardings=shardings)()
    frames, height, width = options.latents
    latents = np.random.default_rng(0).normal(size=(batch, frames, height, width, 16)).astype(np.float32)
    data = {"student": placement.batch(Batch(latents, np.zeros((batch, config.text_len, config.text_dim), np.float32)))}
    step = make_train_step(objective, {"student": graph}, {"student": training}, shardings=shardings)
    program = step.lower(state, data, due=("student",)).compile()
    seconds, loss = [], math.nan
    for _ in range(options.steps + 1):
        begin = time.perf_counter()
        state, metrics = program(state, data)
        loss = float(metrics["student"]["loss"])
        seconds.append(time.perf_counter() - begin)
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in placement.mesh.devices.flat]
    exchanged = collectives(program.as_text())
    return {
        "mesh": str(mesh),
        "devices": mesh.size,
        "clips": batch,
        "ms": 1e3 * statistics.median(seconds[1:]),
        "loss": loss,
        "collectives": summary(exchanged),
        "in_loops_in_a_block": sum(x.times for x in exchanged if x.loops > 1),
        "planned_bytes": memory(program)._asdict() | {"total": memory(program).total},
        "peak_bytes": used,
    }


def checked(parser, options):
    """The meshes; what cannot be run ends the program in one line."""
    if options.steps < 1:
        parser.error(f"--steps {options.steps} must be at least 1")
    try:
        heads = wan_config(options.preset, attention=parse(options.attention)).num_heads
        meshes = [MeshShape.parse(text) for text in options.meshes]
        for mesh in meshes:
            mesh.check_heads(heads)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if too_large := [str(mesh) for mesh in meshes if mesh.size > jax.device_count()]:
        parser.error(f"mesh {too_large[0]} needs more devices than there are, {jax.device_count()}")
    return meshes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wan2.1-t2v-1.3b")
    parser.add_argument("--attention", default="monarch(tile=(3,30,52))")
    parser.add_argument("--state", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--latents", nargs=3, type=int, default=[21, 60, 104], metavar=("F", "H", "W"))
    parser.add_argument("--clips", type=int, default=1, help="clips for each part of the batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--meshes", nargs="+", default=["data=1", f"data={jax.device_count()}"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    meshes = checked(parser, options)
    check(meshes)
    rows = []
    for mesh in meshes:
        row = measure(mesh, options)
        rows.append(row)
        one = next((other for other in rows if other["devices"] == 1), None)
        if one is not None:  # clips a second for each device
            row["rate"] = row["clips"] / row["devices"] / row["ms"] * one["ms"] / one["clips"]
        rate = f"{row['rate']:6.1%}" if "rate" in row else ""
        planned = row["planned_bytes"]["total"] / 2**30
        print(f"{row['mesh']:24} {row['ms']:9.1f} ms {rate} {planned:6.1f} GiB {row['collectives']}", flush=True)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "options": vars(options) | {"out": None},
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
