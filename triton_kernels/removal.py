"""What JAX 0.12 asks of a primitive before it removes what nobody reads, answered for jax-triton's (up to 0.4.1)."""

import inspect
from typing import Any

import jax
from jax.interpreters import partial_eval
from jax_triton.triton_lib import triton_kernel_call_p


def keep_kernels() -> None:
    """Lets a kernel and all that it reads stay, as jax-triton's own rule does, whose parameters are those of JAX 0.11.

    A rule that takes what JAX hands over, as that of a later jax-triton will, is left alone.
    """
    rules: dict[Any, Any] = partial_eval.dce_rules
    rule = rules.get(triton_kernel_call_p)
    if jax.__version_info__ >= (0, 12) and rule is not None and len(inspect.signature(rule).parameters) == 2:
        rules[triton_kernel_call_p] = _keep


def _keep(used_outputs: list[bool], live_inputs: list[bool], equation: Any) -> tuple[list[bool], Any]:
    return [True] * len(equation.invars), equation
