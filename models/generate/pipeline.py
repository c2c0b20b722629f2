"""The pipeline from embeddings to frames, an iterator over frames."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.generate.decoders import FrameDecoder, to_host
from monarchrt.models.generate.plan import PIECE, Plan
from monarchrt.models.sampling import Noise, Rollout, autoregressive, windows
from monarchrt.models.sharding import whole_here
from monarchrt.models.wan import WanModel
from monarchrt.models.wan.unrolled import UnrolledWan


class VideoPipeline:
    """A network and a decoder that generate videos according to a plan.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from monarchrt.models.generate.config import GenerateConfig
        >>> from monarchrt.models.generate.decoders import PatchDecoder
        >>> from monarchrt.models.generate.plan import Defaults, make_plan
        >>> from monarchrt.models.media.latents import PatchDCT
        >>> from monarchrt.models.wan import wan_config
        >>> decoder = PatchDecoder(PatchDCT(patch=2))
        >>> model = WanModel(wan_config("tiny", num_layers=1, in_channels=12, out_channels=12), rngs=nnx.Rngs(0))
        >>> settings = GenerateConfig(frames=6, height=8, width=16, seed=1)
        >>> plan = make_plan(
        ...     settings, defaults=Defaults(mode="autoregressive"), model=model.config, spatial=2, temporal=1
        ... )
        >>> pipeline = VideoPipeline(model, decoder)
        >>> [frames.shape for frames in pipeline(jnp.zeros((1, 8, 32)), plan=plan)]
        [(3, 8, 16, 3), (3, 8, 16, 3)]

    Args:
        model: The network, with the attention to use; or `unroll_layers` of it, for generation block by block.
        decoder: Decodes latents to frames.
        mesh: Devices that share the network's work; its parameters must be on them.
    """

    def __init__(self, model: WanModel | UnrolledWan, decoder: FrameDecoder, *, mesh: Mesh | None = None):
        self.network, self.decoder, self.mesh = model, decoder, mesh

    @property
    def model(self) -> WanModel:
        """The network; without its layers if they are unrolled."""
        return self.network.model if isinstance(self.network, UnrolledWan) else self.network

    def latents(
        self,
        text: Float[Array, "1 L E"],
        *,
        plan: Plan,
        negative: Float[Array, "1 M E"] | None = None,
        initial: Float[Array, "1 K h w C"] | None = None,
        noise: Noise | None = None,
    ) -> Iterator[Float[Array, "1 F h w C"]]:
        """Generates the latents of a video; arguments are as in the call.

        Yields:
            Latents of each part, [1, F, h, w, C], dispatched when it is requested; this does not wait for results.
        """
        frames, height, width = plan.latents
        if initial is not None:  # it may be on the decoder's device
            initial = jnp.asarray(jax.device_get(initial))
        common: dict[str, Any] = dict(
            frames=frames, height=height, width=width, key=jax.random.key(plan.config.seed), initial=initial
        )
        common["noise"] = noise
        common["negative"] = negative if plan.guides else None
        if isinstance(plan.settings, Rollout):
            return self._on_mesh(autoregressive(self.network, text, rollout=plan.settings, **common))
        return _pieces(self._on_mesh(windows(self.model, text, settings=plan.settings, **common)))

    def _on_mesh(self, parts: Iterator[Array]) -> Iterator[Array]:
        """Computes each part with the mesh set, and makes it whole on every process; the mesh is not set in between."""
        while True:
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                part = next(parts, None)
            if part is None:
                return
            yield whole_here(part)

    def __call__(
        self,
        text: Float[Array, "1 L E"],
        *,
        plan: Plan,
        negative: Float[Array, "1 M E"] | None = None,
        initial: Float[Array, "1 K h w C"] | None = None,
        noise: Noise | None = None,
        keep: list[Array] | None = None,
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """Generates a video.

        While frames are fetched and used, the device computes the next block: its network and decoder are dispatched
        before the frames of the previous block are waited for. The decoder's programs are compiled in parallel with the
        network's.

        Args:
            text: Embedding of the prompt.
            plan: The plan.
            negative: Embedding of the negative prompt; used if the plan guides.
            initial: Latents that the video starts with.
            noise: Noise of the generated latents; by default `plan.noise`, from the seed.
            keep: List to which the latents of each part are appended, [1, F, h, w, C].

        Yields:
            RGB frames, uint8 [T, H, W, 3], a part at a time.

        Raises:
            ValueError: If shapes do not fit, before anything is computed.
            UserError: If latents or pixels are NaN or infinite; earlier frames were yielded.
        """
        parts = self.latents(text, plan=plan, negative=negative, initial=initial, noise=noise)
        self.decoder.prepare(1, plan.parts, *plan.latents[1:])
        return self._decoded(parts if keep is None else _kept(parts, keep), plan)

    def _decoded(self, parts: Iterator[Array], plan: Plan) -> Iterator[np.ndarray]:
        state = waiting = None
        for latents in parts:
            if state is None:  # while the network computes
                state = self.decoder.start(1, *plan.latents[1:])
            frames, state = self.decoder.decode(latents, state)
            made = frames, jnp.isfinite(latents).all(), self.decoder.finite(state)
            to_host(*made)
            if waiting is not None:
                yield _fetched(*waiting)
            waiting = made
        if waiting is not None:
            yield _fetched(*waiting)


def _kept(parts: Iterator[Array], keep: list[Array]) -> Iterator[Array]:
    for part in parts:
        keep.append(part)
        yield part


def _fetched(frames: Array, finite: Array, decoded: Array) -> np.ndarray:
    if not finite:
        raise UserError(
            "the latents are NaN or infinite; check the checkpoint's weights, or compute with precision fp32"
        )
    if not decoded:
        raise UserError(
            "the decoded frames are NaN or infinite, though the latents are not; check the weights of the VAE, or "
            "compute with precision fp32"
        )
    return np.asarray(frames)[0]


def _pieces(parts: Iterator[Array]) -> Iterator[Array]:
    """Splits long clips, so that the first frames can be shown before the last are decoded."""
    for part in parts:
        for start in range(0, part.shape[1], PIECE):
            yield part[:, start : start + PIECE]
