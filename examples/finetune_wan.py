"""Finetunes Wan 2.1 with Monarch attention in a training loop of your own: reads a checkpoint and writes one.

    python examples/finetune_wan.py                                   # a tiny network with random weights, on a CPU
    python examples/finetune_wan.py Wan2.1-T2V-1.3B wan-monarch       # reads the first folder, writes the second

The latents and the text are made up here. Replace them by those that `monarchrt encode` writes, one file per clip with
latents [frames, height, width, 16] and text [rows, 4096]. `monarchrt train` does all this with data loading, resuming,
a moving average and logs.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from monarchrt.models.wan import MonarchAttention, WanModel, wan_config
from monarchrt.models.wan.checkpoints import load_checkpoint, save_checkpoint

SHIFT = 3.0  # above 1, training sees more high noise levels
STEPS = 12


def flow_loss(model: WanModel, latents, text, noise, levels):
    """Rectified flow: the network sees a mixture of clip and noise, and predicts noise minus clip."""
    sigma = levels[:, None, None, None, None]
    mixed = (1 - sigma) * latents + sigma * noise
    return jnp.mean((model(mixed, 1000 * levels, text) - (noise - latents)) ** 2)


@nnx.jit
def train_step(model: WanModel, optimizer: nnx.Optimizer, latents, text, key):
    """One step; noise and levels are functions of the key."""
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, latents.shape)
    uniform = jax.random.uniform(level_key, latents.shape[:1])
    levels = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    loss, grads = nnx.value_and_grad(flow_loss)(model, latents, text, noise, levels)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    """Replaces the attention, trains the network, and writes it together with its tile."""
    if len(sys.argv) > 1:
        setting, size = MonarchAttention(tile=(3, 30, 52)), (21, 60, 104)  # 81 frames of 480x832
        model = load_checkpoint(
            sys.argv[1], attention=setting, override=True, param_dtype="float32", dtype="bfloat16", remat="full"
        )
        learning_rate = 1e-5
    else:
        setting, size = MonarchAttention(tile=(3, 4, 4)), (3, 8, 8)
        model = WanModel(wan_config("tiny", attention=setting), rngs=nnx.Rngs(0))
        learning_rate = 3e-3

    optimizer = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate)), wrt=nnx.Param
    )
    config = model.config
    wave = jnp.sin(jnp.arange(size[0] * size[1] * size[2]) / 9).reshape(1, *size, 1)
    latents = wave * jnp.linspace(0.5, 1, config.in_channels)
    text = jnp.ones((1, 8, config.text_dim)) / 4

    for step in range(STEPS):
        loss = train_step(model, optimizer, latents, text, jax.random.fold_in(jax.random.key(1), step))
        if step % 4 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {float(loss):.4f}, attention {setting}")
    if len(sys.argv) > 2:
        print("wrote", save_checkpoint(model, sys.argv[2]))


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(__doc__)
    main()
