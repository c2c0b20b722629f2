"""Kernels over rows of tokens: against their definition in the interpreter, compiled and lowered ahead of time."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from monarchrt.models.wan import passes
from monarchrt.triton_kernels import compile_for, row_passes
from tests.kernels.test_triton import SHARED_MEMORY, compile_launch, interpreted, missing

WIDTH, TOKENS = 1536, 4680


@missing("triton", "torch")
def test_interpreter_agrees_with_the_definition():
    (found,) = interpreted("row_interpreter")
    assert set(found) == {"joined", "apart", "one group", "misplaced", "modulated", "one time", "affine"}
    assert all(error <= 2e-6 for error in found.values()), found


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def write(qkv, scale, cos, keys, values, layer, misplaced, slots):
    each = [(qkv, n * WIDTH) for n in range(3)]
    where = (layer, misplaced, slots)
    return passes.norm_rotate_write("triton", each, (scale, scale), (cos, cos), keys, values, *where, eps=1e-6)


def gated(x, time, table, weights, affine=False):
    norm = ((weights, -1), (weights, -1)) if affine else ((table, 0), (table, 1))
    return passes.gated_norm("triton", x, x, time, (table, 5), *norm, eps=1e-6)


WRITTEN = (
    struct(1, TOKENS, 3 * WIDTH),
    struct(WIDTH),
    struct(TOKENS, 64, dtype=jnp.float32),
    *(struct(2, 1, 7, TOKENS, WIDTH),) * 2,
    struct(dtype=jnp.int32),
    struct(dtype=bool),
    struct(1, dtype=jnp.int32),
)
GATED = (struct(1, 3, 1560, WIDTH), struct(1, 3, 6, WIDTH, dtype=jnp.float32), struct(1, 6, WIDTH), struct(WIDTH))


@missing("triton")
def test_compiled_ahead_of_time(monkeypatch):
    """Rows stay in registers, two programs or more on a multiprocessor."""
    calls = []

    def keep(call, arrays, made):
        calls.append(call)
        return {name: jnp.zeros(made.get(name, arrays.get(name)).shape, jnp.bfloat16) for name in call.writes}

    monkeypatch.setattr(row_passes, "call_kernel", keep)
    jax.eval_shape(write, *WRITTEN)
    for affine in (False, True):
        jax.eval_shape(partial(gated, affine=affine), *GATED)
    assert [call.kernel for call in calls] == ["norm_rotate_write", "gated_norm", "gated_norm"]
    for call in calls:
        registers, spills, shared = compile_launch(call, 90)
        assert (registers <= 128, spills, shared <= SHARED_MEMORY[90] // 8) == (True, 0, True), call.kernel


@missing("triton", "jax_triton")
@pytest.mark.parametrize(("what", "operands", "aliases"), [(write, WRITTEN, 2), (gated, GATED, 0)])
def test_lowered(what, operands, aliases):
    """One kernel each; the cache is changed where it lies."""
    with compile_for(90):
        text = jax.jit(lambda *given: what(*given)).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @triton_kernel_call") == 1
    assert text.count("output_operand_alias<") == aliases


@missing("triton", "jax_triton")
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "chosen"),
    [
        (9.0, "bfloat16", 1536, "triton"),
        (9.0, "float32", 1536, None),
        (9.0, "bfloat16", 9000, None),
        (8.0, "bfloat16", 1536, None),
        (10.0, "bfloat16", 1536, None),
        (None, "bfloat16", 1536, None),
    ],
)
def test_default(monkeypatch, capability, dtype, width, chosen):
    """The kernels where they were measured, and where they can run."""
    monkeypatch.setattr(passes, "cuda_capability", lambda: capability)
    assert passes.default_passes(dtype, width) == chosen


def test_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"passes='tritan' is not None, 'triton' or 'plain'"):
        passes.check_passes("tritan", jnp.bfloat16, 8)
    with pytest.raises(ValueError, match=r"passes='triton' cannot serve this network: .*float32"):
        passes.check_passes("triton", jnp.float32, 8)
