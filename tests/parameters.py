"""Parameters of networks, by name, and whether two networks have the same."""

from typing import Any

import numpy as np
from flax import nnx


def flat(model: Any) -> dict[str, np.ndarray]:
    """A network's parameters by their dotted paths."""
    return {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_same(ours: Any, theirs: Any) -> None:
    """Checks that two networks have the same parameters: names, dtypes and bits."""
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), name
