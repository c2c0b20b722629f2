"""Samples during training: compiled samplers of an objective, and videos of their results for a held-out window."""

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
        sampler: A sampler from `Objective.samplers`.
        mesh: Mesh of the devices that share the work; samples are then replicated on all of them.

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
    """Writes an mp4 of a held-out window next to the result of each sampler, with the same noise every time.

    Args:
        path: The file to write.
        samplers: Samplers by label, from `make_sampler`.
        params: Trained parameters of the network.
        frozen: The network's other variables.
        source: Data with the held-out window.
        pictures: Converts window and samples to pixels; if it has no clip, only samples are shown.
        index: Index of the held-out window.
        zoom: Factor by which pixels are enlarged.
        latest: Further parameters to sample with, such as those of which `params` is the moving average.

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
    if not is_first_process():  # all processes sample, only the first writes
        return path
    clips, labels = [pictures.decode(made[0]) for made in sampled], [label for label, _, _ in makers]
    if pictures.clip is not None:
        newest = np.asarray(latents[0][-sampled[0].shape[1] :], np.float32)  # of pairs, the end of the trajectory
        clips, labels = [pictures.clip(index, newest), *clips], ["clip", *labels]
    return write_mp4(path, side_by_side(clips, labels=labels, zoom=zoom))
