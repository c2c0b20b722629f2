import json

import numpy as np
import pytest
import safetensors.numpy

RANK, ALPHA = 3, 2.0
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
# Wan's own name and diffusers', of the layers of a block that all trainers adapt
BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
OUTER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def sizes(config):
    """[in, out] of the layers by Wan's own name."""
    dim = config.dim
    block = dict.fromkeys(BLOCK, (dim, dim)) | {"ffn.0": (dim, config.ffn_dim), "ffn.2": (config.ffn_dim, dim)}
    found = {f"blocks.{i}.{name}": size for i in range(config.num_layers) for name, size in block.items()}
    return found | {
        "text_embedding.0": (config.text_dim, dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (config.freq_dim, dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (dim, 6 * dim),
        "head.head": (dim, 4 * config.out_channels),
    }


def random_factors(config, *, outer=False, rank=RANK, seed=0):
    """Matrices A [r, in] and B [out, r] of layers, by Wan's own name."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (rng.standard_normal((rank, n_in)) / n_in**0.5).astype(np.float32),
            (rng.standard_normal((n_out, rank)) * 0.5).astype(np.float32),
        )
        for name, (n_in, n_out) in sizes(config).items()
        if outer or name.startswith("blocks.")
    }


def theirs(name):
    """diffusers' name of a layer."""
    if name in OUTER:
        return OUTER[name]
    _, number, rest = name.split(".", 2)
    return f"blocks.{number}.{BLOCK[rest]}"


def as_diffusers(factors, alpha=ALPHA):
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"transformer.{theirs(name)}.lora_A.weight"] = down
        tensors[f"transformer.{theirs(name)}.lora_B.weight"] = up
    if alpha is None:
        return tensors, {}
    header = {
        "transformer.r": len(next(iter(factors.values()))[0]),
        "transformer.lora_alpha": alpha,
        "transformer.target_modules": [theirs(name) for name in factors],
    }
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(header)}


def as_comfyui(factors, alpha=ALPHA, endings=("lora_down", "lora_up"), prefix="diffusion_model."):
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"{prefix}{name}.{endings[0]}.weight"] = down
        tensors[f"{prefix}{name}.{endings[1]}.weight"] = up
        if alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = np.float32(alpha)
    return tensors, {}


def as_musubi(factors, alpha=ALPHA):
    tensors = {}
    for name, (down, up) in factors.items():
        flat = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": np.float32(alpha)}
    return tensors, {}


FORMATS = {
    "diffusers": as_diffusers,
    "comfyui": as_comfyui,
    "comfyui-AB": lambda factors: as_comfyui(factors, endings=("lora_A", "lora_B")),
    "musubi": as_musubi,
}


def save(path, tensors, metadata=None):
    safetensors.numpy.save_file({name: np.asarray(x).copy() for name, x in tensors.items()}, path, metadata or None)
    return path


class Written:
    RANK, ALPHA, FORMATS = RANK, ALPHA, FORMATS
    factors = staticmethod(random_factors)
    as_diffusers, as_comfyui, as_musubi = map(staticmethod, (as_diffusers, as_comfyui, as_musubi))
    save, theirs = staticmethod(save), staticmethod(theirs)


@pytest.fixture(scope="session")
def loras():
    return Written
