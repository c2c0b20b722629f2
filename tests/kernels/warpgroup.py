"""A warpgroup in NumPy, to run what `sm90.cluster` writes for registers; a value is one number per thread.

Stands in for the MLIR dialects: an operation computes at once. Both sides of a branch run, and its threads must agree.
"""

import contextlib
import re
import types

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from monarchrt.pallas_kernels.sm90 import ptx as words
from tests.untyped import there

THREAD = np.arange(128)
ROW = 16 * (THREAD // 32) + THREAD % 32 // 4  # of the first half; the second is 8 below
NARROW = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Value:
    """What the threads hold: [128] numbers, or [128, 2]."""

    def __init__(self, x, kind):
        self.x, self.type = np.asarray(x), kind


def registers(array):
    """[64, 8n] laid out as `plgpu.Layout.WGMMA`, or [64] as its rows: registers of two columns or one number each."""
    array = np.asarray(array, np.float32)
    f32 = ir.F32Type.get()
    if array.ndim == 1:
        found = [Value(array[ROW + 8 * half], f32) for half in range(2)]
        return types.SimpleNamespace(registers=np.array(found, object), shape=array.shape)
    two = ir.VectorType.get((2,), f32)
    at = 2 * (THREAD % 4)
    found = [
        [Value(np.stack([array[ROW + 8 * half, 8 * n + at + m] for m in range(2)], 1), two) for half in range(2)]
        for n in range(array.shape[1] // 8)
    ]
    return types.SimpleNamespace(registers=np.array(found, object)[None], shape=array.shape)


def matrix(held):
    """What `registers` was made from; asserts that all threads of a row agree on a row's number."""
    flat = held.registers.flat
    if flat[0].x.ndim == 1:
        out = np.empty(64, np.float32)
        for half in range(2):
            out[ROW + 8 * half] = flat[half].x
            np.testing.assert_array_equal(out[ROW + 8 * half], flat[half].x)
        return out
    out = np.empty((64, 4 * held.registers.size), np.float32)
    for n, value in enumerate(flat):
        for m in range(2):
            out[ROW + 8 * (n % 2), 8 * (n // 2) + 2 * (THREAD % 4) + m] = value.x[:, m]
    return out


def _two(x, like):
    return x[:, None] if like.x.ndim > x.ndim else x


def _operation(compute, kind=None):
    return lambda *args: Value(compute(*(a.x for a in args)), kind or args[0].type)


def _compare(predicate, a, b):
    name = f"{type(predicate).__name__}.{predicate.name}"  # integers' predicates equal floats' of the same number
    compute = {
        "CmpIPredicate.ne": np.not_equal,
        "CmpIPredicate.eq": np.equal,
        "CmpIPredicate.slt": np.less,
        "CmpFPredicate.OGT": np.greater,
    }[name]
    return Value(compute(a.x, b.x), None)


_arith = types.SimpleNamespace(
    CmpIPredicate=arith.CmpIPredicate,
    CmpFPredicate=arith.CmpFPredicate,
    constant=lambda kind, attribute: Value(np.full(128, attribute.value, _dtype(kind)), kind),
    addi=_operation(np.add),
    subi=_operation(np.subtract),
    xori=_operation(np.bitwise_xor),
    shli=_operation(np.left_shift),
    muli=_operation(np.multiply),
    andi=_operation(np.bitwise_and),
    ori=_operation(np.bitwise_or),
    shrui=_operation(np.right_shift),
    addf=_operation(np.add),
    subf=_operation(np.subtract),
    mulf=_operation(np.multiply),
    maximumf=_operation(np.maximum),
    cmpi=_compare,
    cmpf=_compare,
    extui=lambda kind, x: Value(x.x.astype(np.int32), kind),
    select=lambda c, a, b: Value(np.where(_two(c.x, a), a.x, b.x), a.type),
    truncf=lambda kind, x: Value(x.x.astype(NARROW[str(ir.VectorType(kind).element_type)]), kind),
)
_vector = types.SimpleNamespace(
    extract=lambda x, _, at: Value(x.x[:, at[0]], ir.F32Type.get()),
    broadcast=lambda kind, x: Value(np.stack([x.x] * 2, 1), kind),
    from_elements=lambda kind, parts: Value(np.stack([part.x for part in parts], 1), kind),
)


class _If:
    """`scf.IfOp`: both blocks give their values, and each warp's condition chooses."""

    def __init__(self, condition, kinds, *, has_else):
        del kinds, has_else
        for warp in condition.x.reshape(4, 32):
            assert warp.all() or not warp.any(), "a warp's threads do not agree on a branch"
        self.condition, self.then_block, self.else_block = condition.x, [], []

    @property
    def results(self):
        pairs = zip(self.then_block, self.else_block, strict=True)
        return [Value(np.where(_two(self.condition, a), a.x, b.x), a.type) for a, b in pairs]


def _dtype(kind):
    return np.float32 if kind == ir.F32Type.get() else np.int32


def number(x):
    """A scalar that all threads have."""
    return types.SimpleNamespace(registers=np.array([Value(np.full(128, int(x)), None)], object))


BLOCK_BYTES = 1 << 20  # from the shared memory of a block of a cluster to the next block's


def run(monkeypatch, module, step, *args, memory=None, **options):
    """Calls a step of `pallas_kernels.sm90.cluster` or `cluster_store` on what `registers` gives and other arguments.

    A reference is the byte at which it starts. `memory`, of the whole cluster, has a number for every 4 bytes, or a
    pair where they are two of 16 bits: by byte. What is sent there is noted with the byte of the barrier.
    """
    block, memory = [], {} if memory is None else memory

    @contextlib.contextmanager
    def insertion_point(into):
        block.append(into)
        yield
        block.pop()

    def ptx(text, *operands, result=None, **_):
        if "%tid.x" in text:
            return Value(THREAD, result)
        [x, *rest] = [operand.x for operand in operands]
        if "mapa" in text:
            return Value(x + rest[0] * BLOCK_BYTES, result)
        if "st.global" in text:
            flag, *stored = rest
            at = int(there(re.search(r"\[\$0(?:\+(\d+))?\]", text))[1] or 0)
            for n, value in enumerate(stored):
                for thread in np.flatnonzero(flag):
                    place = int(x[thread]) + at + 4 * n
                    assert place not in memory, "stored twice"
                    memory[place] = value[thread]
            return None
        if "st.async" in text:
            flag, barrier, *stored = rest
            for n, value in enumerate(stored):
                for thread in np.flatnonzero(flag):
                    memory[int(x[thread]) + 4 * n] = (int(barrier[thread]), value[thread])
            return None
        if "ld.shared.v2" in text:
            return [np.array([memory[int(at) + 4 * n] for at in x], np.float32) for n in range(2)]
        if "ex2" in text:
            return Value(np.exp2(x), result)
        if "vote.sync.any" in text:
            return Value(np.repeat(x.reshape(4, 32).any(1), 32).astype(np.int32), result)
        assert "shfl.sync.bfly" in text
        return Value(x[THREAD ^ rest[0]], result)

    names = {name: getattr(ir, name) for name in ("IntegerType", "IntegerAttr", "FloatAttr", "F32Type", "VectorType")}
    replaced = {
        "ir": types.SimpleNamespace(**names, InsertionPoint=insertion_point),
        "arith": _arith,
        "vector": _vector,
        "scf": types.SimpleNamespace(IfOp=_If, yield_=lambda values: block[-1].extend(values)),
        "asm": ptx,
        "inline": lambda *_, **__: lambda function: function,
        "_global": lambda array, units, size: Value(array + units.x * size, None),
        "address": lambda reference: Value(np.full(128, reference), None),
        "unpack": lambda loaded, count, kind=None: [Value(x, kind) for x in loaded[:count]],
        "utils": types.SimpleNamespace(
            bitcast=lambda x, _: x, dtype_to_ir_type=utils.dtype_to_ir_type, bytewidth=utils.bytewidth
        ),
        "llvm": types.SimpleNamespace(StructType=types.SimpleNamespace(get_literal=lambda kinds: kinds)),
        "jnp": types.SimpleNamespace(
            int32=lambda x: number(x) if isinstance(x, int) else x, float32=jnp.float32, dtype=jnp.dtype
        ),
        "array": lambda found, like, shape=None: types.SimpleNamespace(
            registers=np.array(list(found), object).reshape(shape or like.registers.shape)
        ),
    }
    with monkeypatch.context() as patch:
        for name, value in replaced.items():
            for where in (words, module):
                if hasattr(where, name):
                    patch.setattr(where, name, value)
        jaxtyping.config.update("jaxtyping_disable", True)  # what it is given are no arrays of JAX
        try:
            return getattr(module, step)(*args, **options)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def mlir():
    """MLIR's types need a context."""
    from jax._src.interpreters import mlir as interpreter

    with interpreter.make_ir_context(), ir.Location.unknown(), jax.enable_x64(False):
        yield
