"""Array annotations such as `Float[Array, "B N H D"]`: jaxtyping's if it is installed, else plain arrays."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
else:
    try:
        from jaxtyping import Array, Bool, Float, Int
    except ImportError:  # the annotations are then documentation only
        from jax import Array

        class _Inert:
            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = _Inert

__all__ = ["Array", "Bool", "Float", "Int"]
