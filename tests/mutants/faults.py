"""The faults: one line each, in the kind of a slip, and the tests that should notice it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """One slip.

    Attributes:
        file: Of the project.
        before: Text that is in the file once.
        after: What stands there with the fault.
        tests: Files of tests that should notice.
        only: Which of their tests, as pytest's -k; empty: all.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    only: str = ""


DEFINITION = ("tests/attention/test_definition.py",)
BACKENDS = ("tests/attention/test_backends.py",)
CACHE = ("tests/attention/test_cache.py",)
SPEC = ("tests/attention/test_spec.py",)
SPLIT = ("tests/attention/test_partitioning.py",)
MOSAIC = ("tests/kernels/test_mosaic.py",)
MOSAIC_BACK = ("tests/kernels/test_mosaic_backward.py",)
TRITON = ("tests/kernels/test_triton.py",)
VAE = ("tests/models/vae/test_vae.py",)
UMT5 = ("tests/models/umt5/test_encoder.py",)
SOLVERS = ("tests/models/sampling/test_solvers.py",)
WAN = ("tests/models/test_wan.py",)
STATE = ("tests/train/test_state.py",)

FAULTS = (
    # the operation
    Fault("monarch_jax/reference.py", "MAX_FACTOR = 1e-6, 1e4", "MAX_FACTOR = 1e-6, 1e5", DEFINITION, "guard"),
    Fault("monarch_jax/reference.py", "1 / (c_r + EPSILON)", "1 / c_r", DEFINITION, "guard or pytorch"),
    Fault(
        "monarch_jax/reference.py",
        "c_l = (right * log_right).sum(-1)",
        "c_l = -(right * log_right).sum(-1)",
        DEFINITION,
        "pytorch",
    ),
    Fault(
        "monarch_jax/xla.py",
        "d_right = d_right + d_cl[..., None] * log_right",
        "d_right = d_right + d_cl[..., None]",
        DEFINITION,
        "pytorch",
    ),
    Fault("monarch_jax/xla.py", "d_cl = -d_scores.sum(4)", "d_cl = d_scores.sum(4)", DEFINITION, "pytorch"),
    Fault(
        "monarch_jax/contract.py",
        "[None, :] < visible[:, None]",
        "[None, :] <= visible[:, None]",
        DEFINITION,
        "pytorch",
    ),
    Fault(
        "monarch_jax/spec.py",
        "2 * (3 * right + 2 * left) + 3 * extra",
        "2 * (3 * right + 2 * left) + 2 * extra",
        SPEC,
        "costs",
    ),
    Fault(
        "monarch_jax/spec.py",
        "extra = (spec.num_iters - 1) * (2 * right + 2 * left)",
        "extra = (spec.num_iters - 1) * (2 * right + left)",
        SPEC,
        "costs",
    ),
    Fault(
        "monarch_jax/tiles.py",
        "block_end = (frame // spec.causal_block + 1)",
        "block_end = (frame // spec.causal_block + 2)",
        CACHE,
    ),
    Fault(
        "monarch_jax/cache.py",
        "not isinstance(length, int) or length >= frames",
        "not isinstance(length, int) or length >= 0",
        CACHE,
        "queries_without",
    ),
    Fault(
        "monarch_jax/cache.py",
        "sinks + (position - sinks) % (groups - sinks)",
        "(position - sinks) % (groups - sinks)",
        CACHE,
    ),
    Fault("monarch_jax/partitioning.py", "index = index * sizes[name] + ", "index = index + ", SPLIT, "however"),
    Fault(
        "monarch_jax/partitioning.py",
        "PartitionSpec(batch, None, heads, None)",
        "PartitionSpec(None, None, None, None)",
        SPLIT,
    ),
    Fault("monarch_jax/devices.py", "found >= capability", "found > capability", BACKENDS, "compute_capability"),
    # Mosaic
    Fault(
        "pallas_kernels/__init__.py",
        "int(capability) != CAPABILITY",
        "int(capability) < CAPABILITY",
        BACKENDS,
        "hopper",
    ),
    Fault(
        "pallas_kernels/config.py",
        "            self.warpgroups * ROWS * 4,\n            barriers=2 * self.query_stages",
        "            barriers=2 * self.query_stages",
        MOSAIC,
        "shared_memory",
    ),
    Fault(
        "pallas_kernels/config.py",
        "out = self.warpgroups * 2 * ROWS * dim * 2",
        "out = self.warpgroups * ROWS * dim * 2",
        MOSAIC,
        "shared_memory",
    ),
    Fault("pallas_kernels/shared.py", "LOG2E = math.log2(math.e)", "LOG2E = 1.0", MOSAIC, "numbers_in"),
    Fault(
        "pallas_kernels/right_backward_items.py",
        "mean = (r * d_r).sum(axis=1) * scale",
        "mean = (r * d_r).sum(axis=1)",
        MOSAIC_BACK,
    ),
    Fault("pallas_kernels/left_backward_items.py", "lax.rem(x, self.tiles)\n", "lax.div(x, self.tiles)\n", MOSAIC_BACK),
    # Triton
    Fault(
        "triton_kernels/operation.py",
        "first_tile = jnp.max(visible)",
        "first_tile = jnp.min(visible)",
        TRITON,
        "newest",
    ),
    Fault(
        "triton_kernels/operation.py",
        "jnp.int32(min(grad_tiles, k.shape[1]))",
        "jnp.int32(grad_tiles)",
        TRITON,
        "newest",
    ),
    Fault("triton_kernels/plan.py", "min(*columns, 2 * shape.dim)", "min(*columns)", TRITON, "scores_gradient"),
    Fault("triton_kernels/plan.py", "save_dz = grad_tiles is None and ", "save_dz = ", TRITON, "scores_gradient"),
    Fault(
        "triton_kernels/left.py",
        "total = total * shrink + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        TRITON,
        "interpreter_agrees",
    ),
    Fault("triton_kernels/left.py", "d_cl = -tl.sum(d_x, 0)", "d_cl = tl.sum(d_x, 0)", TRITON, "interpreter_agrees"),
    # the networks
    Fault("models/umt5/encoder.py", "/ math.log(config.max_distance / exact)", "/ math.log(config.max_distance)", UMT5),
    Fault(
        "models/umt5/encoder.py",
        "jnp.mean(precise**2, axis=-1, keepdims=True) + self.eps",
        "jnp.mean(precise**2, axis=-1, keepdims=True)",
        UMT5,
    ),
    Fault(
        "models/wan/layers.py",
        "jnp.mean(precise**2, axis=-1, keepdims=True) + self.eps",
        "jnp.mean(precise**2, axis=-1, keepdims=True)",
        WAN,
    ),
    # sampling and training
    Fault("models/sampling/schedules.py", "shift * u / (1 + (shift - 1) * u)", "shift * u / (1 + shift * u)", SOLVERS),
    Fault(
        "models/sampling/tables.py",
        "orders = [2 if 0 < n < steps - 1 else 1 for n in range(steps)]",
        "orders = [2 if 0 < n else 1 for n in range(steps)]",
        SOLVERS,
    ),
    Fault("train/state.py", "        mask=kernels,\n", "", STATE),
)
