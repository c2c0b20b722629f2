"""Faults of passes over rows of tokens and over pixels, and of clusters, which `faults.py` has among its own."""

from tests.mutants.fault import Fault

ROWS = ("tests/kernels/test_rows.py",)
CONVOLUTION = ("tests/kernels/test_convolution.py",)
PIXELS = ("tests/kernels/test_pixels.py",)
UNROLLED = ("tests/models/test_unrolled.py",)
CLUSTER = ("tests/kernels/test_cluster.py",)
MOSAIC = ("tests/kernels/test_mosaic.py",)
STACKS = ("tests/models/test_stacks.py",)
STEP = ("tests/train/test_compiled_step.py",)
TRITON = ("tests/kernels/test_triton_plan.py",)

PASSES = (
    # layers apart, each with its own cache
    Fault("models/attention/dense.py", "return True", "return False", UNROLLED, "own"),
    Fault(
        "models/wan/cached.py",
        "jnp.int32(at), jnp.int32(number), *",
        "jnp.int32(at), jnp.int32(at), *",
        UNROLLED,
        "own",
    ),
    # passes over rows of tokens, and what follows a block
    Fault("triton_kernels/rows.py", "even * c - odd * s", "even * c + odd * s", ROWS, "interpreter"),
    Fault("triton_kernels/rows.py", "at + 1 + token // GROUP", "at + 1", ROWS, "interpreter"),
    Fault("triton_kernels/rows.py", "1.0 + (tl.load(time + SCALE", "(tl.load(time + SCALE", ROWS, "interpreter"),
    Fault("triton_kernels/pixels.py", "column // 2 + b\n", "column // 2 + a\n", PIXELS, "interpreter"),
    Fault("triton_kernels/pixels.py", "tl.maximum(tl.sum(x * x, 1), 1e-24)", "tl.sum(x * x, 1)", PIXELS, "interpreter"),
    Fault(
        "models/vae/causal.py",
        "plain_doubled_norm_silu))",
        "lambda y, g: plain_doubled_norm_silu(y, g * g)))",
        PIXELS,
        "grad",
    ),
    Fault("triton_kernels/pixels.py", "at = frame - tap", "at = frame - 2 + tap", PIXELS, "interpreter"),
    Fault("triton_kernels/pixels.py", "(frame >= FRAMES)", "(frame > FRAMES)", PIXELS, "interpreter"),
    Fault("models/vae/layers.py", "not first and not kernel", "not kernel", PIXELS, "normalised_taps"),
    Fault("models/vae/layers.py", "jnp.pad(bias, (2 * out, 0))", "jnp.pad(bias, (0, 2 * out))", CONVOLUTION, "folds"),
    Fault("models/vae/layers.py", "joined[:, k : k + x", "joined[:, 2 - k : 2 - k + x", CONVOLUTION, "folds"),
    Fault(
        "pallas_kernels/sm90/convolution.py",
        "self.times * self.channels // SLAB",
        "3 * self.channels // SLAB",
        CONVOLUTION,
        "themselves",
    ),
    Fault("models/vae/causal.py", "or 0) != 9", "or 0) < 9", PIXELS, "where_they_serve"),
    Fault("models/wan/passes.py", "or 0) != 9", "or 0) < 9", ROWS, "default"),
    # the kernel whose clusters exchange alpha and Y
    Fault("pallas_kernels/sm90/cluster.py", "-(-256 // form.columns)", "256 // form.columns", CLUSTER, "sent"),
    Fault(
        "pallas_kernels/sm90/cluster.py",
        "ptx.times(ptx.part(column, 0, bits), form",
        "ptx.times(column, form",
        CLUSTER,
        "sent",
    ),
    Fault("pallas_kernels/sm90/cluster.py", "ptx.times(column, 4 * depth)", "ptx.times(column, 4)", CLUSTER, "logits"),
    Fault("pallas_kernels/sm90/fused.py", "(part + 1) * whole", "part * whole + 1", CLUSTER, "spread"),
    Fault("pallas_kernels/sm90/fused_sizes.py", "(at, 0, 0, head, 0)", "(tile, 0, 0, head, 0)", CLUSTER, "together"),
    Fault(
        "pallas_kernels/sm90/cluster_store.py", "ptx.below(row, rows)", "ptx.below(row, rows + 1)", CLUSTER, "stored"
    ),
    Fault("pallas_kernels/sm90/fused.py", "| (j >= low + count) | other", "| other", CLUSTER, "key_row"),
    Fault(
        "pallas_kernels/sm90/fused.py", "c * rows + k, k, n < limit", "c * rows + k, c, n < limit", CLUSTER, "key_row"
    ),
    Fault(
        "pallas_kernels/sm90/tuning.py", "for key in keys if masked)", "for key in keys if not masked)", MOSAIC, "masks"
    ),
    # what layers keep, in stacks
    Fault("models/wan/stacks.py", "and not _summed(var", "and _summed(var", STACKS, "written"),
    Fault("models/wan/stacks.py", "if at <= leaves else", "if at < leaves else", STACKS, "scans"),
    Fault("models/wan/stacks.py", "arange(self._length), reverse=True", "arange(self._length)", STACKS, "scans"),
    Fault("models/wan/stacks.py", "if isinstance(value, Tracer)]", "if False]", STACKS, "close_over"),
    Fault("train/step.py", "config.remat != STACKED or ", "", STEP, "one_gpu"),
    Fault("train/step.py", "settings.accumulation > 1 or not", "settings.accumulation > 2 or not", STEP, "one_gpu"),
    # several refinement steps
    Fault(
        "triton_kernels/plan.py",
        "configs.left_refine_backward or configs.left_backward",
        "configs.left_backward",
        TRITON,
        "of_its_own",
    ),
)
