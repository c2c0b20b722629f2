"""Generation from a run folder of `monarchrt train`, which is only read."""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from monarchrt.models.attention.base import Attention
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import FrameDecoder, PatchDecoder
from monarchrt.models.generate.loras import given_loras, lora_files, lora_settings
from monarchrt.models.generate.material import (
    Material,
    condition_latents,
    given_noise,
    unrolled_if_asked,
    with_products,
)
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.places import find_places
from monarchrt.models.generate.plan import Defaults, Plan, make_plan
from monarchrt.models.generate.run_arrays import run_config, run_network, trained_as
from monarchrt.models.generate.runs import Generation, RunSettings, find_run, identifying_files
from monarchrt.models.lora.merging import AsTrained, Scaled, as_trained, merged
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.media.windows import cut, read_videos, window_starts
from monarchrt.models.processes.alike import check_same, digest_of, listing
from monarchrt.models.wan import WanConfig, WanModel
from monarchrt.models.wan.checkpoints.settings import few_step_from_json, trained_from_json

# settings that do not apply to a run folder, with the reason
NOT_OF_RUNS = {
    "components": "needs no other parts",
    "decoder": "has its own",
    "weights": "has one set of weights",
    "num_heads": "knows its heads",
    "head_dim": "knows its heads",
    "embeddings": "was trained without text",
    "save_embeddings": "was trained without text",
    "guidance": "was trained without text",
}
SEEN = 0  # index of the held-out window with whose first frames a run's video begins
RATE = 8.0  # frames per second


def run_defaults(run: RunSettings, network: WanConfig) -> Defaults:
    """Sampling defaults of a run's network: as it was trained."""
    trained, data, causal = run.generation, run.data, network.causal_block is not None
    forced = trained.level_per_frame
    return Defaults(
        mode="autoregressive" if causal else "windows" if forced else "bidirectional",
        frames=4 * data.frames + 1 if forced and not causal else data.frames,
        height=data.height,
        width=data.width,
        fps=RATE,
        sampler=trained.sampler,
        steps=trained.steps,
        shift=trained.shift,
        guidance=1.0,
        window=data.frames,
        distilled=trained.sampler == "few-step",
        causal=causal,
        trained=trained_as(run),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class RunCheckpoint:
    """An opened run folder; implements `monarchrt.models.generate.material.Opened`."""

    run: RunSettings
    loras: tuple[Scaled, ...] = ()

    @property
    def sizes(self) -> WanConfig:
        """Sizes of the network."""
        config = run_config(self.run, channels=self._decoder().channels)
        with user_input():
            return as_trained(AsTrained(config), self.loras).config

    def check_same(self, config: GenerateConfig, *, what: str = "weights") -> None:
        """As `WanCheckpoint.check_same`."""
        with user_input():
            check_same(what, lambda: listing([*identifying_files(self.run.path), *lora_files(config)]))
            data = dataclasses.replace(self.run.data, video=None)  # its path may differ between machines
            settings = digest_of(self.sizes, self.run.generation, data, lora_settings(config))
            check_same(what.replace("weights", "settings"), lambda: settings)

    def network(
        self, config: GenerateConfig, *, attention: Attention | tuple[Attention, ...] | None = None
    ) -> WanModel:
        """Loads the network."""
        model = run_network(self.run, dtype="bfloat16" if config.precision in ("bf16", "fp8") else "float32")
        if self.loras:
            with user_input():
                sizes = self.sizes
                model = merged(model, self.loras).with_config(
                    attention=sizes.attention, causal_block=sizes.causal_block
                )
        where = find_places(config, heads=model.config.num_heads)
        return with_products(where.moved(model if attention is None else model.with_attention(attention)), config)

    def material(self, config: GenerateConfig, *, report: Callable[[str], None] = _say) -> Material:
        """Loads everything for a video: network, patch transform, an empty text and a held-out frame to start with."""
        path = self.run.path
        for name, why in NOT_OF_RUNS.items():
            value = getattr(config, name)
            if value is not None and not (name == "guidance" and value == 1.0):  # a stored plan says 1.0
                raise UserError(f"{name} is {value}, but checkpoint {path} is a run folder, which {why}; leave it out")
        sizes = self.sizes
        where = find_places(config, heads=sizes.num_heads)
        decoder = self._decoder(where.decoder)
        with user_input():
            for lora, _ in self.loras:
                lora.check(sizes)
        defaults = run_defaults(self.run, sizes)
        plan = make_plan(config, defaults=defaults, model=sizes, spatial=decoder.spatial, temporal=decoder.temporal)
        for note in plan.notes:
            report(note)
        if config.prompt or config.negative_prompt:
            report(f"note: {path} was trained without text; the prompt has no effect")
        self.check_same(config)
        initial = _begin(plan, decoder, self.run, report)
        noise = given_noise(plan, decoder.channels, given=0 if initial is None else initial.shape[1])
        return Material(
            plan=plan,
            pipeline=VideoPipeline(
                unrolled_if_asked(self.network(config, attention=plan.attention), config), decoder, mesh=where.mesh
            ),
            text=jnp.zeros((1, 1, sizes.text_dim)),
            initial=initial,
            noise=noise,
        )

    def _decoder(self, device: Any = None) -> PatchDecoder:
        with user_input():
            transform = PatchDCT(patch=self.run.data.patch, whitening=self.run.data.whitening)
            return PatchDecoder(transform, device=device)


def open_run(config: GenerateConfig) -> RunCheckpoint | None:
    """Opens a run folder; None if the path is not one.

    Raises:
        UserError: If it contains run folders, is damaged, or was trained on latents (use `convert` for those).
    """
    path = Path(config.checkpoint or "")
    run = find_run(path)
    if run is None:
        return None
    if run.lora:
        raise UserError(
            f"checkpoint {path} is a run that trained a LoRA; give the network that it was trained on: `monarchrt "
            f"generate --checkpoint NETWORK --lora {shlex.quote(str(path))}`, or make one of both: `monarchrt convert "
            f"NETWORK NEW --lora {shlex.quote(str(path))}`"
        )
    if run.data.precomputed is not None:
        raise UserError(
            f"checkpoint {path} is a run on precomputed latents; make a model of it with `monarchrt convert "
            f"{shlex.quote(str(path))} NEW`, and give that as checkpoint, with a VAE and a text encoder as components"
        )
    with user_input():
        loras = given_loras(config, report=_say)
        said = [lora.settings for lora, _ in loras if lora.settings]
        return RunCheckpoint(run._replace(generation=distilled_generation(run, said[-1])) if said else run, loras)


def distilled_generation(run: RunSettings, said: dict[str, Any]) -> Generation:
    """Sampling defaults of a run's network with a LoRA that records how it was trained."""
    trained, few_step = trained_from_json(said, where="a LoRA's header"), few_step_from_json(said)
    known = {} if trained is None else {name: getattr(trained, name) for name in ("shift", "steps", "window")}
    if trained is not None and trained.window is not None:
        known["sink_frames"] = trained.sink_frames or 0
    sampler = "few-step" if few_step else Generation.sampler
    return dataclasses.replace(
        run.generation, sampler=sampler, **{name: value for name, value in known.items() if value is not None}
    )


def _begin(plan: Plan, decoder: FrameDecoder, run: RunSettings, report: Callable[[str], None]) -> Any:
    """Latents that a run's video starts with: from `condition`, or from the run's held-out clip."""
    if plan.config.condition is not None:
        return condition_latents(plan, decoder)
    size = (plan.config.height, plan.config.width)
    if plan.config.mode == "bidirectional" or size != (run.data.height, run.data.width):
        return None
    if plan.first_block > run.data.frames or plan.first_block >= plan.latents[0]:
        return None
    try:
        frames = held_out_window(run)[: plan.first_block]
    except UserError as error:
        report(f"note: the run's clip cannot be read ({error}); the video starts from noise")
        return None
    return decoder.encode(frames[None])


def held_out_window(run: RunSettings, index: int = SEEN) -> np.ndarray:
    """A held-out window of the run's data, uint8 [F, H, W, 3].

    Raises:
        UserError: If the video cannot be read or has become shorter.
    """
    data = run.data
    if data.video is None:
        raise UserError("it names no video")
    frames, lengths = read_videos(
        data.video,
        height=round(data.height * data.crop),
        width=round(data.width * data.crop),
        stride=data.stride,
        fps=data.fps,
        window=data.frames,
    )
    starts = window_starts(lengths, window=data.frames, held_out=data.held_out, gap=data.gap).held_out
    if len(starts) <= index:
        raise UserError(f"video {data.video} has {sum(lengths)} frames, and none are left to hold out")
    return cut(frames, starts[index], window=data.frames, height=data.height, width=data.width)
