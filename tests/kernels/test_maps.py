"""The maps in the kernels' READMEs are what the code does."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from monarch_jax.contract import Problem, Residuals
from monarchrt import pallas_kernels
from monarchrt.triton_kernels import config, plan

ROOT = pathlib.Path(__file__).parents[2]


def rows(package, first):
    """Rows of the README's tables whose first cell is one of `first`, or else the table of kernels."""
    lines = (ROOT / package / "README.md").read_text().splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [x for x in cells if (x[0] in ("forward", "backward") and x[1].isdigit()) == first and "---" not in x[0]]


def numbers(row):
    return [int(x) for x in row[1:4]], [x.strip() for x in row[4].split(",")]


@pytest.mark.parametrize("row", rows("pallas_kernels", True), ids=str)
def test_mosaic(monkeypatch, row):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from monarchrt.pallas_kernels.sm90 import backward, forward
    from monarchrt.pallas_kernels.sm90 import fused as both_stages

    (b1, b2, dim), expected = numbers(row)
    ran = []

    def launch(role, inputs):
        ran.append(role.name)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in role.outputs)

    def fused(q, k, v, limits, **options):
        ran.append("monarch_fused")
        return q, jnp.zeros(q.shape[:-1], jnp.float32)

    monkeypatch.setattr(forward, "launch", launch)
    monkeypatch.setattr(backward, "launch", launch)
    monkeypatch.setattr(both_stages, "fused", fused)
    tiles = jax.ShapeDtypeStruct((1, 2, b1, b2, 2, dim), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct(tiles.shape[:-1], jnp.float32)
    visible = jax.ShapeDtypeStruct((2,), jnp.int32)
    problem = Problem(scale=0.1)
    if row[0] == "forward":
        jax.eval_shape(lambda *x: pallas_kernels.forward(problem, *x), tiles, tiles, tiles, visible)
    else:
        given = (tiles, tiles, tiles, visible, tiles, lse)
        jax.eval_shape(lambda g, *x: pallas_kernels.vjp(problem, Residuals(*x), g), tiles, *given)
    assert ran == expected


@pytest.mark.parametrize("row", rows("triton_kernels", True), ids=str)
def test_triton(row):
    (b1, b2, tiles), expected = numbers(row)
    keys = 7 if b1 == 135 else 21
    sizes = dict(b1=b1, b2=b2, dim=128, itemsize=2)
    chosen = config.configs(config.Target(90, "NVIDIA H200"), **sizes, few=tiles < keys)
    shape = plan.Shape(batch=1, query_tiles=tiles, key_tiles=keys, heads=12, **sizes)
    todo = plan.forward(shape, chosen, "ieee") if row[0] == "forward" else plan.backward(shape, chosen, "ieee", None)
    assert [launch.kernel for launch in todo.launches] == expected


def test_triton_of_two_steps():
    """What the README says of them in words."""
    shape = plan.Shape(batch=1, query_tiles=21, key_tiles=21, b1=30, b2=52, heads=12, dim=128, itemsize=2)
    chosen = config.configs(config.Target(90, "NVIDIA H200"), b1=30, b2=52, dim=128, itemsize=2)
    both = plan.refined(shape, chosen, "ieee", 2), plan.refined_backward(shape, chosen, "ieee", None, 2)
    text = " ".join((ROOT / "triton_kernels" / "README.md").read_text().split())
    for direction, todo in zip(("Forward", "Backward"), both, strict=True):
        listed = text.partition(f"{direction} with T = 2, per chunk: ")[2].partition(".")[0]
        assert listed.split(", ") == [launch.kernel for launch in todo.launches]
        assert set(listed.split(", ")) <= {row[0] for row in rows("triton_kernels", False)}


def test_mosaic_of_two_steps(monkeypatch):
    """What the README says of them in words."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from monarchrt.pallas_kernels.sm90 import backward, refined
    from tests.kernels.written_pairs import Written

    ran = []

    def launch(role, inputs):
        ran.append(role.name)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in role.outputs)

    class Pairs(Written):
        def __getattribute__(self, name):
            ran.extend([f"{name}_pairs"] * (name in ("refine", "query", "delta")))
            return super().__getattribute__(name)

    for module in (backward, refined):
        monkeypatch.setattr(module, "launch", launch)
    tiles = jax.ShapeDtypeStruct((1, 2, 90, 52, 2, 128), jnp.bfloat16)
    visible, lse = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct(tiles.shape[:-1], jnp.float32)
    text = " ".join((ROOT / "pallas_kernels" / "README.md").read_text().split())
    problem = Problem(scale=0.1, num_iters=2)
    for direction in ("Forward", "Backward"):
        ran.clear()
        with jax.numpy_rank_promotion("allow"):
            if direction == "Forward":
                jax.eval_shape(lambda *x: pallas_kernels.forward(problem, *x, pairs=Pairs), *[tiles] * 3, visible)
            else:
                given = (tiles, tiles, tiles, visible, tiles, lse)
                back = lambda g, *x: pallas_kernels.vjp(problem, Residuals(*x), g, pairs=Pairs)  # noqa: E731
                jax.eval_shape(back, tiles, *given)
        listed = text.partition(f"{direction} with T = 2, per chunk: ")[2].partition(".")[0].split(", ")
        assert listed == ran
        known = {row[0] for package in ("pallas_kernels", "triton_kernels") for row in rows(package, False)}
        assert set(listed) <= known


@pytest.mark.parametrize(
    ("package", "prefix"), [("pallas_kernels", ""), ("triton_kernels", "monarch_")], ids=["mosaic", "triton"]
)
def test_every_kernel_is_where_the_map_says(package, prefix):
    named = [row for row in rows(package, False) if len(row) == 3 and row[1].endswith(".py")]
    for name, file, _ in named:
        text = (ROOT / package / file).read_text()
        assert f'"{name}"' in text or f"def {name}(" in text
    run = {name for row in rows(package, True) for name in numbers(row)[1]}
    assert run <= {row[0] for row in named}


def test_the_updates_can_be_found():
    """`grep "A.2"` finds the update of L in the definition and wherever a kernel makes L."""
    names = ["monarch_jax/reference.py", "triton_kernels/left.py"]
    names += [f"pallas_kernels/sm90/{x}.py" for x in ("left", "left_tail", "left_backward_items")]
    for name in names:
        assert "L again (paper, A.2)" in (text := (ROOT / name).read_text()) or "update of L (paper, A.2)" in text
