"""Times Self-Forcing distillation at true size: the student's update and the critic's, with dense and Monarch students.

    python benchmarks/distill.py                      # Wan 1.3B student, critic and teacher, 81 frames of 480p
    python benchmarks/distill.py --small              # a tiny network; runs anywhere
    python benchmarks/distill.py --teacher wan2.1-t2v-14b --shapes        # what is held, traced; runs anywhere
    python benchmarks/distill.py --mesh fsdp=2        # on several GPUs: one clip for each part of the batch
    python benchmarks/distill.py --published PATH     # beside the published updates; PATH: a checkout of Self-Forcing

Random weights; student and critic with float32 parameters and moments, computed in bfloat16 with every block
recomputed, the teacher in bfloat16 and dense. One clip, or with --mesh one for each part of the batch. The student
stops at a given step (--last, by default the third of four; the mean is half a step less). Numbers are checked first:
the kernels' clip is XLA's, and so is its gradient; on a mesh, a small network's update has the loss and the norm of
the gradient that it has on one device. The parts of the student's update are timed as programs of their own as well:
roll-out, scores (critic and guided teacher), backward (the last steps again, with their gradient), optimizer (with
the average). The published code is timed first, in a process of its own (`published_distill.py` says what is put in
its way), with a dense student. Writes distill.json.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from attention_settings import CHECKED, EXACT, latent_shape, name_or_notation, setting
from flax import nnx
from jax.sharding import use_abstract_mesh
from measuring import clock, machine, median_seconds, write_report

from monarchrt.models.compiling import training_options
from monarchrt.models.errors import UserError
from monarchrt.models.memory import memory
from monarchrt.models.mesh import MeshShape
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.scores import matching_gradient, matching_loss
from monarchrt.train.objectives.self_forcing import RolloutDraws, SelfForcingObjective
from monarchrt.train.objectives.settings import SelfForcingConfig
from monarchrt.train.sharding import Placement
from monarchrt.train.state import (
    Training,
    TrainState,
    create_role,
    create_state,
    frozen_of,
    make_training,
    split_model,
    update_ema,
)
from monarchrt.train.step import make_train_step

MAX_ERROR = 3e-2  # of a clip in bfloat16, after several calls of the network
MAX_GRADIENT_ERROR = 1e-1  # of that of its last steps
MAX_MESH_ERROR = 1e-3  # of a float32 update's loss and norm of its gradient, from those of one device
GUIDED = 8  # rows of the negative prompt
ROLES = ("student", "critic")  # that train


class Fixed(SelfForcingObjective):
    """The objective with a last step that is given, and a guided teacher."""

    def __init__(self, settings: SelfForcingConfig, last: int, text_dim: int):
        super().__init__(settings)
        self.last = last
        self.negative = np.full((GUIDED, text_dim), 0.1, np.float32)

    def draw_role(self, key, shape):
        draws = super().draw_role(key, shape)
        return draws._replace(student=draws.student._replace(last=jnp.int32(self.last)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", type=name_or_notation, default=["dense", "monarch 97%"])
    parser.add_argument("--last", type=int, default=2, help="the step, from 0, that every block stops at")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a tiny network and clip")
    parser.add_argument("--teacher", help="preset of the teacher, as wan2.1-t2v-14b; the student's is the default")
    parser.add_argument("--updates", nargs="+", choices=ROLES, default=ROLES, help="those that are timed")
    parser.add_argument("--shapes", action="store_true", help="trace, say what is held, and compute nothing")
    parser.add_argument("--mesh", help="axes of several devices, as fsdp=2; default: one device, without a mesh")
    parser.add_argument("--published", type=Path, help="a checkout of guandeh17/Self-Forcing, to time as well")
    args = parser.parse_args()
    if args.repeats < 1 or not 0 <= args.last <= 3:
        parser.error("--repeats must be at least 1 and --last one of 0 to 3")
    if args.published and not (args.published / "model" / "dmd.py").is_file():
        parser.error(f"--published is {args.published}, which has no model/dmd.py; give a checkout of Self-Forcing")
    try:
        args.placement = placed(args)
    except UserError as error:
        parser.error(f"--mesh {args.mesh}: {error}")
    return args


def placed(args: argparse.Namespace) -> Placement | None:
    """The mesh; None without --mesh, and with --shapes, which are those of one device."""
    if args.mesh is None or args.shapes:
        return None
    mesh = MeshShape.parse(args.mesh)
    mesh.check_heads(wan_config("tiny" if args.small else "wan2.1-t2v-1.3b").num_heads)
    return Placement(batch=mesh.batch_parts, mesh=args.mesh, devices=jax.devices()[: mesh.size])


def on_mesh(placement: Placement | None) -> contextlib.AbstractContextManager[Any]:
    """In which a program is traced."""
    return contextlib.nullcontext() if placement is None else use_abstract_mesh(placement.mesh.abstract_mesh)


def shape_of(args: argparse.Namespace) -> tuple[int, ...]:
    """Latents of a batch, [B, F, H, W, C]: a clip for each part of it."""
    clips = 1 if args.placement is None else args.placement.shape.batch_parts
    return (clips, *latent_shape(args.small)[1:])


def network(name: str, args: argparse.Namespace, *, trains: bool, preset: str | None = None, **changes) -> WanModel:
    """A network with random weights, of the attention of that name."""
    _, _, height, width, _ = shape_of(args)
    config = wan_config(
        preset or ("tiny" if args.small else "wan2.1-t2v-1.3b"),
        dtype="bfloat16",
        param_dtype="float32" if trains else "bfloat16",
        remat="full",
        attention=setting(name, height // 2, width // 2),
        **changes,
    )
    return WanModel(config, rngs=nnx.Rngs(0))


def check(args: argparse.Namespace) -> tuple[float, float]:
    """Relative errors of a clip and of its gradient by all parameters, against XLA's, of a shallow network."""
    changes: dict[str, Any] = {"num_layers": 2, "causal_block": 3}
    model = nnx.jit(lambda: network(CHECKED, args, trains=True, **changes))()
    kernel = model.head.proj.kernel  # starts at zero, which would make all clips equal
    kernel[...] = 0.02 * jax.random.normal(jax.random.key(1), kernel.shape)
    objective = Fixed(SelfForcingConfig(), 2, model.config.text_dim)
    shape = (1, 6, 16, 16, 16)
    draws = cast(RolloutDraws, objective.draw_role(jax.random.key(2), shape).student)
    text = jax.random.normal(jax.random.key(3), (1, 8, model.config.text_dim))

    weights = jax.random.normal(jax.random.key(4), shape)

    @nnx.jit
    def made(model):
        rolled = objective.roll_out(model, text, draws)
        graph, params = nnx.split(model)

        def loss(params):
            return jnp.vdot(weights, objective.replay(nnx.merge(graph, params), text, rolled, draws.last))

        return rolled.x - draws.noise, jax.grad(loss)(params)

    rows, columns = shape[2] // 2, shape[3] // 2
    ours, reference = (
        [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)])
            for part in made(model.with_attention(kind))
        ]
        for kind in (setting(CHECKED, rows, columns), setting(CHECKED, rows, columns, implementation="xla"))
    )
    clip, gradient = (float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, reference, strict=True))
    return clip, gradient


def check_mesh(args: argparse.Namespace) -> float:
    """Relative error of the loss and gradient's norm of a small student's float32 update, from those on one device."""
    config = wan_config(
        "tiny", dim=192, ffn_dim=384, num_heads=12, text_len=8, causal_block=3, attention=setting(EXACT, 4, 8)
    )
    role = make_training(OptimizerConfig(learning_rate=1e-3), updates=1)
    objective = Fixed(SelfForcingConfig(), 2, config.text_dim)
    graph = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))[0]
    batch = args.placement.shape.batch_parts
    text = np.random.default_rng(0).normal(size=(batch, config.text_len, config.text_dim)).astype(np.float32)
    data = Batch(np.zeros((batch, 6, 8, 16, 16), np.float32), text)

    def create() -> TrainState:
        def made(seed: int) -> Any:
            params, frozen = split_model(WanModel(config, rngs=nnx.Rngs(seed)))[1:]
            waves = jax.tree.map(
                lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
            )
            return create_role(waves, frozen, role)

        return create_state({name: made(seed) for seed, name in enumerate(("student", "critic", "teacher"))}, seed=0)

    def update(placement: Placement | None) -> np.ndarray:
        where = placement and placement.shardings(jax.eval_shape(create))
        step = make_train_step(
            objective,
            dict.fromkeys((*ROLES, "teacher"), graph),
            dict.fromkeys(ROLES, role),
            configs=dict.fromkeys(ROLES, config),
            shardings=where,
        )
        state = jax.jit(create, **({} if where is None else {"out_shardings": where}))()
        with jax.default_matmul_precision("highest"):
            metrics = step(state, {"student": placement.batch(data) if placement else data}, due=("student",))[1]
        return np.array([float(metrics["student"][name]) for name in ("loss", "grad_norm")])

    one, ours = update(None), update(args.placement)
    return float(np.max(np.abs(ours - one) / np.abs(one)))


def time_parts(
    objective: Fixed, graphs: dict[str, Any], state: TrainState, batch: Batch, training: Training, args: Any
) -> dict[str, float]:
    """Seconds of the parts of the student's update, each a program of its own, on the same numbers."""

    def compiled(run: Any) -> Any:  # as the whole update
        @functools.partial(jax.jit, compiler_options=options_on(args.placement))
        def program(*arguments: Any) -> Any:
            with on_mesh(args.placement):
                return run(*arguments)

        return program

    draws, text = objective.draws(jax.random.key(5), batch)["student"], jnp.asarray(batch.text)
    if args.placement is not None:
        draws = args.placement.batch(draws)
    rolls, levels = cast(RolloutDraws, draws.student), objective.score_levels(draws.scores)
    negative = np.asarray(objective.negative)
    given = jnp.broadcast_to(jnp.asarray(negative), (text.shape[0], *negative.shape))
    roles, student = state.roles, state.roles["student"]
    frozen = {role: frozen_of(roles, role) for role in roles}  # an argument of every program: 28 GB of a teacher of 14B

    def network(role: str, params: Any, frozen: dict[str, Any]) -> Any:
        return nnx.merge(graphs[role], params, frozen[role])

    @compiled
    def roll_out(params, frozen):
        return objective.roll_out(network("student", params, frozen), text, rolls)

    @compiled
    def score(critic, teacher, frozen, x):
        networks = {"critic": network("critic", critic, frozen), "teacher": network("teacher", teacher, frozen)}
        weight, noise = objective.settings.weight or 3.0, draws.scores.noise
        return matching_gradient(x, text, given, **networks, guidance=weight, levels=levels, noise=noise)[0]

    @compiled
    def backward(params, frozen, rolled, g):
        def loss(params):
            return matching_loss(objective.replay(network("student", params, frozen), text, rolled, rolls.last), g)

        return jax.grad(loss)(params)

    @compiled
    def update(gradient, optimizer, params, average):
        changes, optimizer = training.optimizer.update(gradient, optimizer, params)
        params = optax.apply_updates(params, changes)
        return params, optimizer, update_ema(average, params, state.step + 1, training.settings)

    seconds: dict[str, float] = {}

    def timed(name: str, run: Any, *arguments: Any) -> Any:
        results, first = clock(run, *arguments)
        print(f"  {name}: {first:.1f} s, compiling included", flush=True)
        seconds[name] = median_seconds(lambda: run(*arguments), args.repeats, uncounted=0)
        return results

    rolled = timed("roll-out", roll_out, student.params, frozen)
    g = timed("scores", score, roles["critic"].params, roles["teacher"].params, frozen, rolled.x)
    gradient = timed("backward", backward, student.params, frozen, rolled, g)
    timed("optimizer", update, gradient, student.optimizer, student.params, student.average)
    return seconds


class Update:
    """A student, critic and teacher with random weights, and the compiled steps that train the first two."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, placement = name, args, args.placement
        self.make = {
            "student": functools.partial(network, name, args, trains=True, causal_block=3),
            "critic": functools.partial(network, EXACT, args, trains=True),
            "teacher": functools.partial(network, EXACT, args, trains=False, preset=args.teacher),
        }
        networks = {role: nnx.eval_shape(made) for role, made in self.make.items()}
        settings = {
            "student": OptimizerConfig(learning_rate=2e-6, beta1=0.0, beta2=0.999),
            "critic": OptimizerConfig(learning_rate=4e-7, beta1=0.0, beta2=0.999, ema_decay=None),
        }
        self.trainings = {role: make_training(own, updates=1000) for role, own in settings.items()}
        self.shapes = jax.eval_shape(self.create)
        self.shardings = placement and placement.shardings(self.shapes)
        config = networks["student"].config
        self.objective = Fixed(SelfForcingConfig(), args.last, config.text_dim)
        self.graphs = {role: split_model(model)[0] for role, model in networks.items()}
        configs = {role: model.config for role, model in networks.items()}
        self.step = make_train_step(
            self.objective, self.graphs, self.trainings, configs=configs, shardings=self.shardings
        )
        shape = shape_of(args)
        text = jax.random.normal(jax.random.key(1), (shape[0], config.text_len, config.text_dim), jnp.bfloat16)
        batch = Batch(np.zeros(shape, np.float32), np.asarray(text, np.float32))
        self.batch = placement.batch(batch) if placement else batch

    def create(self) -> TrainState:
        """The state before the first update."""
        roles = {}
        for role, made in self.make.items():
            params, frozen = split_model(made())[1:]
            roles[role] = (
                create_role(params, frozen, self.trainings[role])
                if role in self.trainings
                else create_role(nnx.State({}), nnx.merge_state(params, frozen), None)
            )
        return create_state(roles, seed=0)

    def show_sizes(self) -> None:
        """Traces the updates and prints what each role holds."""
        for role in self.args.updates:
            self.step.eval_shape(self.shapes, {role: self.batch}, due=(role,))
        held = {
            role: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes.roles[role])) / 1e9
            for role in self.make
        }
        sizes = ", ".join(f"{role} {size:.1f} GB" for role, size in held.items())
        print(f"{self.name}: {sizes}; {sum(held.values()):.1f}")

    def timed(self, role: str, state: TrainState) -> tuple[dict[str, Any], TrainState]:
        """One role's row of the report, and the state after its updates."""
        start = time.perf_counter()
        compiled = self.step.lower(state, {role: self.batch}, due=(role,)).compile()
        compiling = time.perf_counter() - start
        needed, seconds = memory(compiled), []
        for _ in range(self.args.repeats + 1):
            (state, metrics), taken = clock(compiled, state, {role: self.batch})
            seconds.append(taken)
        devices = devices_of(self.args.placement)
        row = {
            "update": role,
            "attention": self.name,
            "last": self.args.last,
            "seconds": statistics.median(seconds[1:]),
            "memory_gb": needed.arrays / 1e9,
            "state_gb": needed.arguments / 1e9,
            "compile_seconds": compiling,
            "finite": bool(metrics[role]["finite"]),
            "clips": self.batch.latents.shape[0],
            "peak_bytes": [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices],
        }
        print(
            f"{role:8s} {self.name:12s} {row['seconds']:6.2f} s  {row['memory_gb']:5.1f} GB, of which the state "
            f"{row['state_gb']:.1f}  compiled in {compiling:.0f} s",
            flush=True,
        )
        return row, state


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times both updates with one kind of student."""
    update = Update(name, args)
    if args.shapes:
        update.show_sizes()
        return []
    start = time.perf_counter()
    places = {} if update.shardings is None else {"out_shardings": update.shardings}
    state = jax.block_until_ready(jax.jit(update.create, **places)())
    print(f"{name}: networks with random weights made in {time.perf_counter() - start:.0f} s", flush=True)
    parts = time_parts(update.objective, update.graphs, state, update.batch, update.trainings["student"], args)
    print("  ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()), flush=True)
    rows = []
    for role in args.updates:
        row, state = update.timed(role, state)
        rows.append(row | ({"parts": parts} if role == "student" else {}))
    return rows


def devices_of(placement: Placement | None) -> list[Any]:
    """The devices of the mesh; the first without one."""
    return jax.devices()[:1] if placement is None else list(placement.mesh.devices.flat)


def options_on(placement: Placement | None) -> dict[str, Any]:
    """How a program is compiled there."""
    heads = 1 if placement is None else placement.mesh.shape.get("heads", 1)
    return training_options(devices_of(placement), heads=heads)


def run_published(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of the published updates, by role."""
    command = [sys.executable, Path(__file__).parent / "published_distill.py", args.published.resolve()]
    command += ["--last", args.last, "--repeats", args.repeats, *["--small"] * args.small]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the published code failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    for role in ROLES:
        row = found[role]
        print(f"{role:8s} {'published':12s} {row['seconds']:6.2f} s  {row['memory_gb']:5.1f} GB", flush=True)
    return found


def main() -> None:
    """Checks, measures, writes."""
    args = parse()
    if args.shapes:
        for name in args.attention:
            measure(name, args)
        return
    theirs = run_published(args) if args.published else None  # before this process takes memory
    if not args.small and jax.default_backend() == "cpu":
        print("error: there is no GPU, and a CPU would take hours; --small and --shapes run anywhere", file=sys.stderr)
        raise SystemExit(2)
    error, gradient_error = check(args)
    print(f"clips agree to {error:.1e}, gradients to {gradient_error:.1e}", flush=True)
    if not (error <= MAX_ERROR and gradient_error <= MAX_GRADIENT_ERROR):
        raise SystemExit(f"that is more than {MAX_ERROR:.0e} and {MAX_GRADIENT_ERROR:.0e}")
    mesh_error = None if args.placement is None else check_mesh(args)
    if mesh_error is not None:
        print(f"update on {args.mesh} agrees to {mesh_error:.1e} with one device's", flush=True)
        if not mesh_error <= MAX_MESH_ERROR:
            raise SystemExit(f"that is more than {MAX_MESH_ERROR:.0e}")
    report: dict[str, Any] = {
        **machine(),
        "error": error,
        "gradient_error": gradient_error,
        "mesh": args.mesh,
        "mesh_error": mesh_error,
        "teacher": args.teacher,
        "published": theirs,
        "rows": [],
    }
    for name in args.attention:
        report["rows"] += measure(name, args)
        write_report(args.out / "distill.json", report)
    pairs = {name: sum(row["seconds"] for row in report["rows"] if row["attention"] == name) for name in args.attention}
    for name, seconds in pairs.items():
        print(f"{' and '.join(args.updates)}, {name}: {seconds:.2f} s ({pairs[args.attention[0]] / seconds:.2f}x)")
        if theirs:
            published = sum(theirs[role]["seconds"] for role in args.updates)
            print(f"  published, dense: {published:.2f} s ({published / seconds:.2f}x)")


if __name__ == "__main__":
    main()
