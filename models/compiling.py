"""How XLA compiles the programs of large networks."""

# Products by cuBLASLt, with bias and GELU at their end, not searched for among Triton's: 4 to 5% less time for a cached
# call of Wan 1.3B on an H200, and less to compile. None are merged: that would put weights together in every call.
# For programs of their own only: JAX refuses options of a `jax.jit` inside of another. Other devices ignore them.
LIBRARY_PRODUCTS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

# Of training steps. XLA would write what a layer keeps for its backward pass right into the stack of all layers', and
# form it a second time for what else reads it: with `remat="cheap"` all products of the forward pass were done twice.
TRAINING = LIBRARY_PRODUCTS | {"xla_gpu_enable_dynamic_slice_fusion": False}
