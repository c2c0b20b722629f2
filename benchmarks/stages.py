"""Times one training step of each stage of a distillation at true size, with dense and Monarch students.

    python benchmarks/stages.py                       # Wan 1.3B, 81 frames of 480p, by worth
    python benchmarks/stages.py --seconds 240         # begins no row after so long
    python benchmarks/stages.py --stages consistency ode --attention dense
    python benchmarks/stages.py --after stages.json   # goes on with a report of the same card: only rows that it lacks
    python benchmarks/stages.py --small               # a tiny network; runs anywhere

The step is that of `monarchrt train`, with the objective's own optimizer and average: one clip, random weights, float32
parameters and moments, computed in bfloat16 with every block recomputed; teachers and critics are dense, teachers
guided and in bfloat16. Diffusion forcing, teacher forcing, consistency and ODE regression have blocks of 3 frames; DMD
is bidirectional, and its student stops at a given step (--last, by default the third of four). "pairs" is what ODE
regression learns from: some steps of the solver that `monarchrt pairs` follows, with guidance, in bfloat16. It has
no student, so its attention is the teacher's. Updates of Self-Forcing are those of `distill.py`.
The gradients of what students call are compared with XLA's before anything is timed, of a shallow network. Memory is
that of the compiled program. Writes stages.json after each row.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_settings import CHECKED, EXACT, latent_shape, name_or_notation, setting
from flax import nnx
from measuring import clock, machine, write_report

from monarchrt.models.memory import memory
from monarchrt.models.wan import WanConfig, WanModel, wan_config
from monarchrt.models.wan.teacher_forced import teacher_forced
from monarchrt.train.config import OptimizerConfig, role_defaults
from monarchrt.train.data import Batch
from monarchrt.train.objectives.base import Objective
from monarchrt.train.objectives.registry import ObjectiveSettings, make_objective
from monarchrt.train.objectives.settings import (
    ConsistencyConfig,
    DMDConfig,
    FlowConfig,
    ODEConfig,
    TeacherForcingConfig,
)
from monarchrt.train.pairs import PairsConfig, follower
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step

MAX_ERROR = 1e-1  # of a gradient in bfloat16
GUIDED = 8  # rows of the negative prompt
NEGATIVE = Path("negative")  # stands for its file; the embedding is given below


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a row times: a role's update by an objective; without one, pairs are made."""

    settings: ObjectiveSettings | None
    role: str = "student"
    block: int | None = 3


# in order of worth
STAGES = {
    "teacher forcing": Stage(settings=TeacherForcingConfig()),
    "consistency": Stage(settings=ConsistencyConfig(block=3, negative=NEGATIVE)),
    "diffusion forcing": Stage(settings=FlowConfig(frames_per_level=3)),
    "ode": Stage(settings=ODEConfig(block=3)),
    "pairs": Stage(settings=None, role="teacher", block=None),
    "dmd student": Stage(settings=DMDConfig(negative=NEGATIVE), block=None),
    "dmd critic": Stage(settings=DMDConfig(negative=NEGATIVE), role="critic", block=None),
}
SOLVER_STEPS = 4  # that are timed of those of "pairs"


def main() -> None:
    """Checks, times, prints, writes."""
    begun = time.monotonic()
    args = parse()
    report = opened(args)
    if not report["gradient_error"] <= MAX_ERROR:
        sys.exit(f"that is more than {MAX_ERROR:.0e}")
    args.out.mkdir(parents=True, exist_ok=True)
    timed = {(row["stage"], row["attention"]) for row in report["rows"]}
    for attention in args.attention:
        for name in args.stages:
            if STAGES[name].settings is None and attention != args.attention[0]:
                continue  # the teacher's is always the same
            if (name, EXACT if STAGES[name].settings is None else attention) in timed:
                continue
            if time.monotonic() - begun > args.seconds:
                print(f"{name}, {attention}: not begun, as {args.seconds:.0f} s are over", flush=True)
                continue
            try:
                row = measure(name, attention, args)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row = {"stage": name, "attention": attention, "error": "out of memory"}
            report["rows"].append(row)
            print(line(report["rows"][-1]), flush=True)
            write_report(args.out / "stages.json", report)


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """The report without rows, after the check; or that of --after, whose check stands."""
    report: dict[str, Any] = {
        **machine(),
        "last": args.last,
        "solver_steps": SOLVER_STEPS,
    }
    if args.after is None:
        report |= {"gradient_error": check(args), "rows": []}
        print(f"gradients agree to {report['gradient_error']:.1e}", flush=True)
        return report
    try:
        before = json.loads(args.after.read_text())
        found = {name: before[name] for name in report}
        rows, error = [row for row in before["rows"] if "error" not in row], float(before["gradient_error"])
        _ = [(row["stage"], row["attention"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(f"error: --after {args.after} is not a stages.json of this script; give one, or leave it out")
    if found != report:
        sys.exit(f"error: --after {args.after} has {found}, but this run {report}; leave it out")
    print(f"{args.after}: {len(rows)} rows, gradients agreed to {error:.1e}", flush=True)
    return report | {"gradient_error": error, "rows": rows}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=Path, metavar="REPORT", help="a report to go on with, instead of a check")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--attention", nargs="+", type=name_or_notation, default=["monarch 97%", "dense"])
    parser.add_argument("--last", type=int, default=2, help="the step, from 0, that the student of DMD stops at")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row begins after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a tiny network and clip")
    args = parser.parse_args()
    if args.repeats < 1 or not 0 <= args.last <= 3:
        parser.error("--repeats must be at least 1 and --last one of 0 to 3")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds} must be more than 0")
    if not args.small and jax.default_backend() == "cpu":
        parser.error("there is no GPU, and a CPU would take hours; --small runs anywhere")
    return args


def frame_of(small: bool) -> tuple[int, int]:
    """Rows and columns of tokens of one of its frames."""
    _, _, height, width, _ = latent_shape(small)
    return height // 2, width // 2


def objective_of(settings: ObjectiveSettings, last: int, text_dim: int) -> Objective:
    """The objective, with an embedding of a negative prompt and the last step of DMD's student given."""
    objective: Any = make_objective(settings)
    objective.negative = np.full((GUIDED, text_dim), 0.1, np.float32)  # instead of reading a file
    if isinstance(settings, DMDConfig):
        draw = objective.draw_role

        def fixed(key: Any, shape: tuple[int, ...]) -> Any:
            draws = draw(key, shape)
            return draws._replace(student=draws.student._replace(last=jnp.int32(last)))

        objective.draw_role = fixed
    return objective


def configurations(
    stage: Stage, attention: str, args: argparse.Namespace, frame: tuple[int, int], *, implementation: str | None = None
) -> dict[str, WanConfig]:
    """Each network's, by role, for frames of so many rows and columns of tokens."""
    roles = {"teacher": None} if stage.settings is None else stage.settings.roles
    kinds = {"student": setting(attention, *frame, implementation=implementation)}
    return {
        name: wan_config(
            "tiny" if args.small else "wan2.1-t2v-1.3b",
            dtype="bfloat16",
            remat="full",
            attention=kinds.get(name, setting(EXACT, *frame)),
            causal_block=stage.block,
            param_dtype="float32" if role is not None and role.trains else "bfloat16",
        )
        for name, role in roles.items()
    }


@functools.cache
def drawn(config: WanConfig) -> Any:
    """Random parameters of a network."""
    return nnx.split(nnx.jit(lambda: WanModel(config, rngs=nnx.Rngs(0)))())[1]


def network(config: WanConfig) -> WanModel:
    """A network whose arrays are nobody else's, as a step uses them up."""
    plain = dataclasses.replace(
        config, attention=setting(EXACT, 1, 1), causal_block=None, remat="none", param_dtype="float32"
    )
    graph, shapes = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
    arrays = jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype, copy=True), drawn(plain), shapes)
    return nnx.merge(graph, arrays)


def training_of(settings: ObjectiveSettings, role: str) -> Any:
    """As `monarchrt train` has it by default."""
    return make_training(role_defaults(settings, role).optimizer or OptimizerConfig(), updates=1000)


def state_of(settings: ObjectiveSettings, models: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Structure of each network, and the state before the first step."""
    parts = {name: split_model(model) for name, model in models.items()}

    def create(parts: dict[str, Any]) -> Any:
        roles = {
            name: create_role(params, frozen, training_of(settings, name))
            if settings.roles[name].trains
            else create_role(nnx.State({}), nnx.merge_state(params, frozen), None)
            for name, (params, frozen) in parts.items()
        }
        return create_state(roles, seed=0)

    return {name: part[0] for name, part in parts.items()}, create({name: part[1:] for name, part in parts.items()})


def batch_of(settings: ObjectiveSettings | None, config: WanConfig, shape: tuple[int, ...]) -> Batch:
    """One example; of ODE regression all its states, one after the other."""
    states = len(settings.student_steps) + 1 if isinstance(settings, ODEConfig) else 1
    latents = np.random.default_rng(0).normal(size=(1, states * shape[1], *shape[2:])).astype(np.float32)
    text = np.random.default_rng(1).normal(size=(1, config.text_len, config.text_dim)).astype(np.float32)
    return Batch(latents, text)


def check(args: argparse.Namespace) -> float:
    """Relative error of the gradient of what students call, against XLA's: a shallow network, a small clip."""
    shape, blocks = (1, 6, 16, 16, 16), {STAGES[name].block for name in args.stages}
    frame = shape[2] // 2, shape[3] // 2
    clean, noisy, weights = (jax.random.normal(jax.random.key(n), shape) for n in (2, 3, 4))
    times = jnp.array([[900.0] * 3 + [300.0] * 3])

    def flows(model: Any, text: jax.Array) -> jax.Array:
        calls = [model(noisy, times[:, 0], text)] if None in blocks else []
        if 3 in blocks:
            causal = model.with_config(causal_block=3)
            calls += [causal(noisy, times, text), teacher_forced(causal, noisy, times, clean, text)]
        return sum((jnp.vdot(weights, flow) for flow in calls), jnp.zeros(()))

    gradients = []
    for implementation in (None, "xla"):
        stage = Stage(settings=FlowConfig(), block=None)
        config = configurations(stage, CHECKED, args, frame, implementation=implementation)["student"]
        model = network(dataclasses.replace(config, num_layers=2))
        kernel = model.head.proj.kernel  # starts at zero, which would leave most gradients zero
        kernel[...] = 0.02 * jax.random.normal(jax.random.key(1), kernel.shape)
        text = jax.random.normal(jax.random.key(5), (1, 8, config.text_dim))
        found = jax.tree.leaves(nnx.jit(nnx.grad(flows))(model, text))
        gradients.append(np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in found]))
    ours, right = gradients
    return float(np.linalg.norm(ours - right) / np.linalg.norm(right))


def measure(name: str, attention: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times a row."""
    stage = STAGES[name]
    begin = time.perf_counter()
    compiled, call = (pairs if stage.settings is None else update)(stage, attention, args)
    seconds = []
    compiling = time.perf_counter() - begin
    for _ in range(args.repeats + 1):
        finite, taken = clock(call)
        seconds.append(taken)
    needed = memory(compiled)
    return {
        "stage": name,
        "attention": EXACT if stage.settings is None else attention,
        "seconds": statistics.median(seconds[1:]),
        "memory_gb": needed.arrays / 1e9,
        "state_gb": needed.arguments / 1e9,
        "start_seconds": compiling,
        "finite": bool(finite),
    }


def update(stage: Stage, attention: str, args: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """The compiled step, and a call of it that says whether loss and gradient were finite."""
    settings: Any = stage.settings
    configs = configurations(stage, attention, args, frame_of(args.small))
    graphs, state = state_of(settings, {name: network(config) for name, config in configs.items()})
    objective = objective_of(settings, args.last, configs["student"].text_dim)
    trainings = {name: training_of(settings, name) for name in settings.training}
    batches = {stage.role: batch_of(settings, configs["student"], latent_shape(args.small))}
    step = make_train_step(objective, graphs, trainings, configs=configs)
    compiled = step.lower(state, batches, due=(stage.role,)).compile()
    held = [state]
    del state  # each step uses up the one before

    def call() -> Any:
        held[0], metrics = jax.block_until_ready(compiled(held[0], batches))
        return metrics[stage.role]["finite"]

    return compiled, call


def pairs(stage: Stage, attention: str, args: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """The compiled solver, and a call of it."""
    config = configurations(stage, attention, args, frame_of(args.small))["teacher"]
    graph, params = nnx.split(network(config))
    made = PairsConfig(steps=SOLVER_STEPS, negative=NEGATIVE)
    negative = np.full((GUIDED, config.text_dim), 0.1, np.float32)
    text = batch_of(None, config, latent_shape(args.small)).text
    follow = follower(made, graph, latent_shape(args.small)[1:], negative=negative)
    inputs = params, np.zeros(1, np.int32), text
    compiled = follow.lower(*inputs).compile()
    return compiled, lambda: jnp.isfinite(jax.block_until_ready(compiled(*inputs))[1]).all()


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['stage']:18s} {row['attention']:12s} {row['error']}"
    return (
        f"{row['stage']:18s} {row['attention']:12s} {row['seconds']:7.3f} s  {row['memory_gb']:5.1f} GB, of which "
        f"arguments {row['state_gb']:.1f}  ready in {row['start_seconds']:.0f} s"
    ) + ("" if row["finite"] else "  NOT FINITE")


if __name__ == "__main__":
    main()
