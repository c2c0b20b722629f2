"""A training loop of your own with Optax on several devices: each takes a part of the batch.

    python examples/train_mesh.py
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/train_mesh.py     # four devices on one CPU

Under `jit`, `monarch_attention` on arrays whose batch or heads are split works on each device's part; nothing is
gathered.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from monarch_jax import MonarchSelfAttention

GRID, TILE = (4, 6, 8), (2, 6, 8)
WIDTH, HEADS, BATCH, STEPS = 64, 4, 4, 30


class Denoiser(nnx.Module):
    """Two attention layers that predict the noise in a clip of tokens."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([MonarchSelfAttention(WIDTH, num_heads=HEADS, tile=TILE, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x, grid=GRID)
        return self.head(x)


def loss_fn(model: Denoiser, clean, noise, level):
    """Rectified flow: the network sees a mixture and predicts noise minus clean."""
    mixed = (1 - level) * clean + level * noise
    return jnp.mean((model(mixed) - (noise - clean)) ** 2)


@nnx.jit
def train_step(model: Denoiser, optimizer: nnx.Optimizer, clean, key):
    """One step; noise and levels are functions of the key, so a run can be repeated."""
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, clean.shape)
    level = jax.random.uniform(level_key, (clean.shape[0], 1, 1))
    loss, grads = nnx.value_and_grad(loss_fn)(model, clean, noise, level)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    """Trains for a few steps and prints the loss."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    model = Denoiser(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    for part in (model, optimizer):
        nnx.update(part, jax.device_put(nnx.state(part), replicated))

    smooth = jnp.sin(jnp.arange(4 * 6 * 8)[:, None] / 7 + jnp.arange(WIDTH) / 5)  # every clip is this wave, shifted
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), step)
        shifts = jax.random.randint(key, (BATCH,), 0, WIDTH)
        clean = jax.device_put(jnp.stack([jnp.roll(smooth, shift, axis=1) for shift in shifts]), split)
        loss = train_step(model, optimizer, clean, key)
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {float(loss):.4f} on {mesh.size} device(s)")


if __name__ == "__main__":
    main()
