"""Argument checks whose errors name the argument, the value and a valid choice."""

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Set

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

FLOATS = ("bfloat16", "float16", "float32", "float64")
LARGEST = 2**31 - 1  # largest size: indices are int32
LARGEST_SCALE = 1e6  # largest softmax scale: scores beyond about 1e9 have no digits left for exp in float32
_NOT_NUMBERS = (bool, np.bool_, str, bytes)  # which float() would accept
_SHOWN = 80  # characters of a value in a message


def brief(value: object) -> str:
    """The repr of a value, shortened for a message.

    Examples:
        >>> brief("w,hf"), len(brief(10**5000)), len(brief("x" * 5000))
        ("'w,hf'", 33, 80)
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than about 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def softmax_scale(scale: object, head_dim: int) -> float:
    """Checks a softmax scale: a finite number that does not carry ordinary scores beyond the precision of float32.

    Examples:
        >>> softmax_scale(None, 64)
        0.125
        >>> softmax_scale(1e38, 64)
        Traceback (most recent call last):
        ...
        ValueError: scale=1e+38 is too large for a softmax in float32; use at most 1e+06, or multiply query by the rest.

    Args:
        scale: The number, or None for head_dim**-0.5.
        head_dim: Channels of a head.

    Returns:
        The scale as a float.

    Raises:
        ValueError: If it is traced, an array or no finite number, or its magnitude is above 1e6.
    """
    if scale is None:
        return head_dim**-0.5
    try:
        factor = math.nan if isinstance(scale, _NOT_NUMBERS) else float(scale)  # pyright: ignore[reportArgumentType]
    except OverflowError:  # an integer beyond every float
        factor = LARGEST
    except (TypeError, ValueError):  # also raised by a tracer
        factor = math.nan
    if not math.isfinite(factor):
        raise ValueError(
            f"scale={brief(scale)} is not a finite number; multiply query by one that is traced or an array."
        )
    if abs(factor) > LARGEST_SCALE:
        raise ValueError(
            f"scale={brief(scale)} is too large for a softmax in float32; use at most {LARGEST_SCALE:g}, or multiply "
            f"query by the rest."
        )
    return factor


def positive(name: str, value: int, *, most: int = LARGEST) -> int:
    """Checks a positive integer.

    Examples:
        >>> positive("heads", 0)
        Traceback (most recent call last):
        ...
        ValueError: heads=0 is not a positive integer.
        >>> positive("num_layers", 10**10, most=1000)
        Traceback (most recent call last):
        ...
        ValueError: num_layers=10000000000 is too large; it should be at most 1000.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.
        most: Largest valid value.

    Returns:
        The value as an int.

    Raises:
        ValueError: If it is not a positive integer (booleans are not), or is too large.
    """
    number = _integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name}={brief(value)} is not a positive integer.")
    if number > most:
        raise ValueError(f"{name}={brief(value)} is too large; it should be at most {most}.")
    return number


def natural(name: str, value: object) -> int:
    """Checks an integer from 0 on.

    Examples:
        >>> natural("width", -1)
        Traceback (most recent call last):
        ...
        ValueError: width=-1 is not an integer from 0 to 2147483647.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.

    Returns:
        The value as an int.

    Raises:
        ValueError: If it is not an integer (booleans are not), negative, or too large.
    """
    number = _integer(value)
    if number is None or not 0 <= number <= LARGEST:
        raise ValueError(f"{name}={brief(value)} is not an integer from 0 to {LARGEST}.")
    return number


def small(name: str, value: float) -> None:
    """Checks a number between 0 and 1, such as a norm's epsilon.

    Examples:
        >>> small("eps", float("nan"))
        Traceback (most recent call last):
        ...
        ValueError: eps=nan is not a number above 0 and below 1.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.

    Raises:
        ValueError: If it is not a number above 0 and below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name}={brief(value)} is not a number above 0 and below 1.")


def index(name: str, value: int | jax.Array) -> int | jax.Array:
    """Checks an integer that may be traced.

    Examples:
        >>> index("frame", 2.5)
        Traceback (most recent call last):
        ...
        ValueError: frame=2.5 is not an integer or an integer scalar of JAX.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.

    Returns:
        An int, or the unchanged array.

    Raises:
        ValueError: If it is neither an integer (booleans are not) nor a scalar array of integers.
    """
    if isinstance(value, jax.Array):
        if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} has shape {value.shape}, dtype {value.dtype.name}; it should be an int32 scalar.")
        return value
    number = _integer(value)
    if number is None:
        raise ValueError(f"{name}={brief(value)} is not an integer or an integer scalar of JAX.")
    return number


def array(name: str, value: object) -> jax.Array:
    """Checks and converts a float array; NumPy's float64 becomes float32 unless `jax_enable_x64` is set.

    Examples:
        >>> array("query", [1.0, 2.0])
        Traceback (most recent call last):
        ...
        ValueError: query is a list; it should be an array of JAX or NumPy.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.

    Returns:
        The JAX array, which may be traced.

    Raises:
        ValueError: If it is neither a JAX nor a NumPy array, or its dtype is not a float.
    """
    if not isinstance(value, jax.Array | np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} is a {type(value).__name__}; it should be an array of JAX or NumPy.")
    if value.dtype.name not in FLOATS:
        raise ValueError(f"{name} has dtype {value.dtype.name}; it should be one of {', '.join(FLOATS)}.")
    return jnp.asarray(value)


def flag(name: str, value: bool) -> bool:
    """Checks a bool; a string such as "no", which would be truthy, is an error.

    Examples:
        >>> flag("rolling", "no")
        Traceback (most recent call last):
        ...
        ValueError: rolling='no' is not True or False.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.

    Returns:
        The bool.

    Raises:
        ValueError: If it is not one.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={brief(value)} is not True or False.")
    return bool(value)


def float_dtype(name: str, value: DTypeLike) -> jnp.dtype:
    """Checks a float dtype that attention supports; float64 becomes float32 unless `jax_enable_x64` is set.

    Examples:
        >>> float_dtype("dtype", "int8")
        Traceback (most recent call last):
        ...
        ValueError: dtype='int8' is not one of bfloat16, float16, float32, float64.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.

    Returns:
        The dtype.

    Raises:
        ValueError: If it is none of `FLOATS`.
    """
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FLOATS:
        shown = brief(value) if dtype is None or isinstance(value, str) else dtype.name
        raise ValueError(f"{name}={shown} is not one of {', '.join(FLOATS)}.")
    return jax.dtypes.canonicalize_dtype(dtype)


def _integer(value: object) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:  # also raised by tracers
        return None


def triple(name: str, value: Iterable[int], form: str) -> tuple[int, int, int]:
    """Checks three positive integers.

    Examples:
        >>> triple("tile", [1, 30, 52], "(n_f, n_h, n_w)")
        (1, 30, 52)

    Args:
        name: Name of the argument, for the message.
        value: The value to check.
        form: Names of the three, for the message, such as "(n_f, n_h, n_w)".

    Returns:
        The three as a tuple.

    Raises:
        ValueError: If there are not exactly three, or one is not a positive integer.
    """
    try:
        sizes = () if isinstance(value, Set | Mapping) else tuple(value)  # a set has no order
    except TypeError:
        sizes = ()
    if len(sizes) != 3:
        raise ValueError(f"{name}={brief(value)} is not three integers {form}.")
    return (positive(f"{name}[0]", sizes[0]), positive(f"{name}[1]", sizes[1]), positive(f"{name}[2]", sizes[2]))


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Checks that a value is one of the choices.

    Examples:
        >>> one_of("remat", "ful", ("none", "full"))
        Traceback (most recent call last):
        ...
        ValueError: remat='ful' is unknown; did you mean 'full'? Choices: 'none', 'full'.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.
        choices: The valid values.

    Returns:
        The value.

    Raises:
        ValueError: If it is none of them; the message suggests the closest.
    """
    choices = tuple(choices)
    if not is_one_of(value, choices):
        raise ValueError(f"{name}={brief(value)} is unknown; {suggestion(value, choices)}")
    return value


def is_one_of(value: object, choices: Iterable[str]) -> bool:
    """Whether a value of any type is one of the names.

    Examples:
        >>> is_one_of("xla", ("triton", "xla")), is_one_of(np.array(["xla", "triton"]), ("triton", "xla"))
        (True, False)
    """
    return isinstance(value, str) and value in tuple(choices)


def suggestion(value: object, choices: Iterable[str]) -> str:
    """The end of an error message: the closest choice, if one is similar, and the list of all choices.

    Examples:
        >>> suggestion("w,hf", ("fh,w", "w,fh"))
        "did you mean 'w,fh'? Choices: 'fh,w', 'w,fh'."
    """
    choices = tuple(choices)
    close = difflib.get_close_matches(str(value), choices, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Choices: {', '.join(map(repr, choices))}."
