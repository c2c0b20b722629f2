"""Training steps of a Wan network on meshes of this machine's devices, against one of them: one command, one report.

    python benchmarks/scale.py --meshes data=1 data=4 fsdp=4 heads=4 data=2,heads=2 --out scale.json

Before anything is timed, a small network must have the loss and the gradient of one device on every mesh. Each device
has a clip of its own, those of an axis heads one together; "rate" is clips a second for each device, against one
device's. Collectives are read from the compiled program, the memory is what its compiler planned.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/scale.py \\
        --ahead benchmarks/h200/target.txt --meshes data=2 fsdp=2 heads=2

compiles for H200s on a machine without a GPU (with the CUDA plugin of JAX all the same): collectives and memory only.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, use_abstract_mesh
from measuring import machine, write_report

from monarchrt.models.attention.notation import parse
from monarchrt.models.collectives import collectives, summary
from monarchrt.models.memory import memory
from monarchrt.models.mesh import MeshShape
from monarchrt.models.sharding import partition
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.config import REMAT
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import FlowConfig
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

    def gradients(mesh):
        placement = Placement(batch=batch, mesh=str(mesh), devices=jax.devices()[: mesh.size])

        def loss(params, latents, times, text):
            with use_abstract_mesh(placement.mesh.abstract_mesh):
                return (nnx.merge(graph, params)(latents, times, text) * latents).mean()

        own = jax.device_put(params, placement.shardings(params))
        with jax.default_matmul_precision("highest"):
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(own, *placement.batch((latents, times, text))))

    right = gradients(MeshShape())
    for mesh in meshes:
        for x, y in zip(jax.tree.leaves(gradients(mesh)), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5, err_msg=f"mesh {mesh}")


class Case:
    """A training step on a mesh, compiled; nothing is made yet."""

    def __init__(self, mesh, options, devices):
        config = wan_config(
            options.preset,
            attention=parse(options.attention),
            dtype="bfloat16",
            param_dtype=options.state,
            remat=options.remat,
        )
        training = make_training(OptimizerConfig(ema_decay=None), updates=options.steps)
        frames, height, width = options.latents
        self.batch = mesh.batch_parts * options.clips
        self.placement = Placement(batch=self.batch, mesh=str(mesh), devices=devices)
        self.latents = self.batch, frames, height, width, config.in_channels
        self.text = self.batch, config.text_len, config.text_dim
        graph = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))[0]

        def create():
            params, fixed = split_model(WanModel(config, rngs=nnx.Rngs(0)))[1:]
            return create_state({"student": create_role(params, fixed, training)}, seed=0)

        state = jax.eval_shape(create)
        self.shardings = self.placement.shardings(state)
        self.create = create
        step = make_train_step(
            make_objective(FlowConfig()),
            {"student": graph},
            {"student": training},
            configs={"student": config},
            shardings=self.shardings,
        )
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.shardings)
        abstract: Any = Batch  # of arrays that are not there
        data = {"student": abstract(self._abstract(self.latents), self._abstract(self.text))}
        self.program = step.lower(state, data, due=("student",)).compile()

    def _abstract(self, shape):
        where = NamedSharding(
            self.placement.mesh, partition(self.placement.mesh, shape, ("batch", *(None,) * (len(shape) - 1)))
        )
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    def planned(self, mesh):
        """The part of a row that the program says."""
        exchanged = collectives(self.program.as_text())
        used = memory(self.program)
        return {
            "mesh": str(mesh),
            "devices": mesh.size,
            "clips": self.batch,
            "collectives": summary(exchanged),
            "in_loops_in_a_block": sum(x.times for x in exchanged if x.loops > 1),
            "largest": [x._asdict() for x in sorted(exchanged, key=lambda x: -x.bytes * x.times)[:8]],
            "planned_bytes": used._asdict() | {"total": used.total},
        }


def measure(mesh, options):
    """One row of the report."""
    case = Case(mesh, options, jax.devices()[: mesh.size])
    state = jax.jit(case.create, out_shardings=case.shardings)()
    latents = np.random.default_rng(0).normal(size=case.latents).astype(np.float32)
    data = {"student": case.placement.batch(Batch(latents, np.zeros(case.text, np.float32)))}
    seconds, loss = [], math.nan
    for _ in range(options.steps + 1):
        begin = time.perf_counter()
        state, metrics = case.program(state, data)
        loss = float(metrics["student"]["loss"])
        seconds.append(time.perf_counter() - begin)
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in case.placement.mesh.devices.flat]
    return case.planned(mesh) | {"ms": 1e3 * statistics.median(seconds[1:]), "loss": loss, "peak_bytes": used}


def plan(mesh, options):
    """One row for devices that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=options.ahead.read_text(), topology=f"1x1x{mesh.size}"
    )
    return Case(mesh, options, list(topology.devices)).planned(mesh)


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
    if options.ahead is not None:
        if not options.ahead.is_file():
            parser.error(f"--ahead {options.ahead} is no file; benchmarks/h200/target.txt is one")
        return meshes
    if too_large := [str(mesh) for mesh in meshes if mesh.size > jax.device_count()]:
        parser.error(f"mesh {too_large[0]} needs more devices than there are, {jax.device_count()}")
    return meshes


def line(row):
    """One row for the terminal."""
    if "error" in row:
        return f"{row['mesh']:24} {row['error']}"
    timed = f"{row['ms']:9.1f} ms" if "ms" in row else ""
    if "rate" in row:
        timed += f" {row['rate']:6.1%}"
    return f"{row['mesh']:24} {timed} {row['planned_bytes']['total'] / 2**30:6.1f} GiB {row['collectives']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wan2.1-t2v-1.3b")
    parser.add_argument("--attention", default="monarch(tile=(3,30,52))")
    parser.add_argument("--state", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="full", choices=REMAT, help="what the backward pass recomputes of a block")
    parser.add_argument("--latents", nargs=3, type=int, default=[21, 60, 104], metavar=("F", "H", "W"))
    parser.add_argument("--clips", type=int, default=1, help="clips for each part of the batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--meshes", nargs="+", default=["data=1", f"data={jax.device_count()}"])
    parser.add_argument("--ahead", type=Path, metavar="TARGET", help="compile only, for GPUs that are not there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    meshes = checked(parser, options)
    if options.ahead is None:
        check(meshes)
    rows: list[dict[str, Any]] = []
    report = {
        **machine(),
        **({} if options.ahead is None else {"device": f"none: compiled for {options.ahead}"}),
        "options": vars(options) | {"out": None},
        "rows": rows,
    }
    for mesh in meshes:
        try:
            row = measure(mesh, options) if options.ahead is None else plan(mesh, options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row = {"mesh": str(mesh), "devices": mesh.size, "error": "out of memory"}
        rows.append(row)
        one = next((other for other in rows if other["devices"] == 1 and "ms" in other), None)
        if one is not None:
            for other in rows:
                if "ms" in other:  # clips a second for each device
                    other["rate"] = other["clips"] / other["devices"] / other["ms"] * one["ms"] / one["clips"]
        print(line(row), flush=True)
        if options.out is not None:
            write_report(options.out, report, default=str)


if __name__ == "__main__":
    main()
