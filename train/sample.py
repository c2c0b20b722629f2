"""Samples while training: an objective's samplers, compiled, and an mp4 of what they make of a held-out window."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import Array

from monarchrt.models.media.video import side_by_side, write_mp4
from monarchrt.models.processes.agreement import is_first_process
from monarchrt.models.processes.programs import compiled_by_all
from monarchrt.train.data import Source
from monarchrt.train.objectives.base import Sampler
from monarchrt.train.objectives.flow import euler_sample, evaluation_noise, flow_sampler, sampling_levels
from monarchrt.train.pictures import Pictures

__all__ = ["euler_sample", "flow_sampler", "make_sampler", "sampling_levels", "write_held_out_sample"]


def make_sampler(graph: nnx.GraphDef, sampler: Sampler, *, mesh: Mesh | None = None) -> Callable[..., Array]:
    """Compiles a sampler for a network that was split.

    Args:
        graph: Structure of the network.
        sampler: What an objective's `samplers` holds.
        mesh: Mesh of the devices that share the work; what is sampled is then on all of them.

    Returns:
        (params, frozen, latents, text, noise) -> sampled latents.
    """

    def sample(params: Any, frozen: Any, *arrays: Any) -> Array:
        with use_abstract_mesh(AbstractMesh((), ()) if mesh is None else mesh.abstract_mesh):
            return sampler(nnx.merge(graph, params, frozen), *arrays)

    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return compiled_by_all(jax.jit(sample, out_shardings=where))


def write_held_out_sample(
    path: Path,
    samplers: Mapping[str, Callable[..., Array]],
    params: Any,
    frozen: Any,
    source: Source,
    *,
    pictures: Pictures,
    index: int = 0,
    zoom: int = 1,
    latest: Any = None,
) -> Path:
    """Writes an mp4 of a held-out window next to what each sampler makes of it, of the same noise every time.

    Args:
        path: The file.
        samplers: Label -> sampler, from `make_sampler`.
        params: Parameters.
        frozen: The network's other variables.
        source: What is held out.
        pictures: Turns it, and what is made, into pixels; without a clip, what is made is shown alone.
        index: Held-out window.
        zoom: Enlarge each pixel.
        latest: Parameters to show too, such as those that `params` is the moving average of.

    Returns:
        The path.
    """
    latents, text = source.held_out_batch([index])
    noise = evaluation_noise(index, 0, latents.shape)
    makers = [(label, make, params) for label, make in samplers.items()]
    if latest is not None:
        shown = (("average", params), ("latest", latest))
        makers = [(f"{label}, {name}", make, of) for label, make, _ in makers for name, of in shown]
    sampled = [np.asarray(make(of, frozen, latents, text, noise), np.float32) for _, make, of in makers]
    if not is_first_process():  # all processes make them, one writes them
        return path
    clips, labels = [pictures.decode(made[0]) for made in sampled], [label for label, _, _ in makers]
    if pictures.clip is not None:
        newest = np.asarray(latents[0][-sampled[0].shape[1] :], np.float32)  # of pairs, the end of a teacher's way
        clips, labels = [pictures.clip(index, newest), *clips], ["clip", *labels]
    return write_mp4(path, side_by_side(clips, labels=labels, zoom=zoom))
