"""Counts the arithmetic of a traced function; nothing is compiled and nothing runs.

Only matrix products and convolutions are counted. Attention is traced in its definition, independent of the kernels
that would compute it; the whole capacity of a cache counts, filled or not. The body of a loop counts once for each
iteration.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

# calls of kernels, whose products do not appear in the traced function
KERNELS = ("triton_kernel_call", "pallas_call", "mosaic_gpu", "dot_product_attention", "core_map", "run_state")


class UncountedError(ValueError):
    """A function calls kernels, whose products cannot be counted."""


class Work(NamedTuple):
    """Arithmetic operations in products; a multiply-add counts as 2.

    Attributes:
        products: In products with weights, that is, without batch dimensions.
        attended: In products with batch dimensions, as in attention.
        float32: Those of both whose operands are float32.
        full_precision: Those of `float32` that a GPU may not round to TensorFloat-32.
    """

    products: float = 0.0
    attended: float = 0.0
    float32: float = 0.0
    full_precision: float = 0.0

    @property
    def total(self) -> float:
        """All operations."""
        return self.products + self.attended

    def times(self, count: float) -> "Work":
        """The work multiplied by a number."""
        return Work(*(count * x for x in self))

    def plus(self, other: "Work") -> "Work":
        """The sum of this and other work."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def work(run: Callable[..., Any], *arguments: Any, turns: float = 1.0) -> Work:
    """Counts the products of a function.

    Examples:
        >>> x = jax.ShapeDtypeStruct((2, 3), "float32")
        >>> work(lambda x: x @ x.T, x).products
        24.0

    Args:
        run: The function.
        arguments: Arrays, or `jax.ShapeDtypeStruct`.
        turns: Number of iterations of loops for which it does not follow from shapes.

    Raises:
        UncountedError: If the function calls a kernel, as attention with an explicit implementation does.
    """
    # traced for a CPU, where attention does not call kernels
    with jax.default_device("cpu"):
        return _of(jax.make_jaxpr(run)(*arguments).jaxpr, turns)


def _of(jaxpr: Any, turns: float) -> Work:
    total = Work()
    for equation in jaxpr.eqns:
        total = total.plus(_equation(equation, turns))
    return total


def _equation(equation: Any, turns: float) -> Work:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            return _product(equation)
        case "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            count = 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / outputs
            return Work(products=count, **_kinds(equation, count))
        case "scan":
            return _of(params["jaxpr"].jaxpr, turns).times(float(params["length"]))
        case "while":
            return _of(params["body_jaxpr"].jaxpr, turns).times(turns)
        case "cond":  # the most expensive branch
            return max((_of(branch.jaxpr, turns) for branch in params["branches"]), key=lambda found: found.total)
        case "shard_map":
            return _of(params["jaxpr"], turns).times(float(params["mesh"].size))
    if equation.primitive.name.startswith(KERNELS):
        raise UncountedError(f"it calls a kernel, {equation.primitive.name}, whose products cannot be counted")
    total = Work()
    for inner in _within(tuple(params.values())):
        total = total.plus(_of(inner, turns))
    return total


def _product(equation: Any) -> Work:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    count = 2.0 * math.prod(shape[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)
    where = {"attended": count} if batched else {"products": count}
    return Work(**where, **_kinds(equation, count))


def _kinds(equation: Any, count: float) -> dict[str, float]:
    if any(x.aval.dtype.itemsize < jnp.dtype("float32").itemsize for x in equation.invars[:2]):
        return {}
    precision = equation.params.get("precision")
    asked = precision if isinstance(precision, tuple) else (precision,)
    precise = any(x in (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH) for x in asked)
    return {"float32": count} | ({"full_precision": count} if precise else {})


def _within(values: Any) -> Iterator[Any]:
    """The nested programs among the parameters of an equation, such as the function of a call."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _within(value)
