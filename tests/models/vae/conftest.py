import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.reading import fill_model, parameter_shapes, to_ours
from monarchrt.models.vae import VAEConfig, WanVAE
from monarchrt.models.vae.checkpoint import vae_entries

# Small, with every kind of block: shortcuts, both resamplers, statistics other than the released ones.
SMALL = VAEConfig(
    dim=6,
    dim_mult=(1, 2, 3, 3),
    z_dim=3,
    num_res_blocks=1,
    latents_mean=(0.3, -0.2, 0.1),
    latents_std=(1.5, 0.7, 2.0),
)


@functools.cache
def diffusers_vae(seed=0):
    """diffusers' autoencoder of the same sizes, every parameter random."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLWan(
        base_dim=SMALL.dim,
        z_dim=SMALL.z_dim,
        dim_mult=list(SMALL.dim_mult),
        num_res_blocks=SMALL.num_res_blocks,
        temperal_downsample=list(SMALL.temporal_downsample),
        latents_mean=list(SMALL.latents_mean),
        latents_std=list(SMALL.latents_std),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.ndim == 1 or "gamma" in name else parameter[0].numel() ** -0.5
            parameter.normal_(0, spread)
            if "gamma" in name:
                parameter.add_(1)
        model.decoder.conv_out.weight.mul_(0.3)  # or most of the output is cut at 1
    return model.eval()


def vae_from_torch(state_dict, config=SMALL, naming="diffusers"):
    """Our model with torch's parameters; every one must be used."""
    left = dict(state_dict)
    arrays = [(entry, to_ours(left.pop(entry.names[naming]).numpy(), entry.layout)) for entry in vae_entries(config)]
    assert not left, f"not in the mapping: {sorted(left)}"
    model = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    assert {entry.path for entry, _ in arrays} == set(parameter_shapes(model))
    return fill_model(model, arrays, dtype=jnp.float32)


@pytest.fixture(scope="session")
def torch_vae():
    return diffusers_vae()


@pytest.fixture(scope="session")
def vae(torch_vae):
    """Not to be changed in place."""
    return vae_from_torch(torch_vae.state_dict())


def clip(frames, height=16, width=24, batch=1, seed=0):
    """A random video in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-1, 1, (batch, frames, height, width, 3)), jnp.float32)
