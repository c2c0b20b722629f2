"""Runs the published losses of the other stages on a CPU, and keeps what they give in `published_stages.npz`.

    python -O -m tests.data.make_stages SELF_FORCING CAUSAL_FORCING

As `make_distilled`, which says what stands in for what.
"""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.data import distilled_inputs as inputs
from tests.data.make_distilled import HERE, Mocked, Network, grid, published

CHANNELS_FIRST = (0, 1, 4, 2, 3)


def first(x: np.ndarray) -> torch.Tensor:
    """[..., H, W, C] as [..., C, H, W]."""
    tensor = torch.tensor(x).double()
    return tensor.permute(*range(tensor.ndim - 3), -1, -3, -2)


class Student(Network):
    """Whole clips: each block after the noisy ones before it, or after clean ones that stand in front of all."""

    def __init__(self, code: Any, *, role: str = "student", causal: bool = True):
        super().__init__(code, role, 5.0)
        number = np.arange(inputs.FRAMES) // inputs.BLOCK
        before, same = number[None] < number[:, None], number[None] == number[:, None]
        self.after_noisy = before | same if causal else None
        self.after_clean = np.block([[before | same, np.zeros_like(same)], [before, same]])

    def forward(self, noisy_image_or_video, conditional_dict, timestep, clean_x=None, aug_t=None):
        latents, times = noisy_image_or_video, timestep.double()
        mask, places = self.after_noisy, np.arange(inputs.FRAMES)
        if clean_x is not None:
            told = torch.zeros_like(times) if aug_t is None else aug_t.double()
            latents, times = torch.cat([clean_x, latents], 1), torch.cat([told, times], 1)
            mask, places = self.after_clean, np.tile(places, 2)
        text = conditional_dict["prompt_embeds"]
        flow, _ = self.plain(latents.permute(0, 1, 3, 4, 2), times, text, positions=places, mask=mask)
        flow = flow.permute(CHANNELS_FIRST)[:, -inputs.FRAMES :]
        convert = self.code.wrapper._convert_flow_pred_to_x0
        flat = convert(self, flow.flatten(0, 1), noisy_image_or_video.flatten(0, 1), timestep.flatten(0, 1))
        return flow, flat.unflatten(0, flow.shape[:2])


def regression(code: Any, name: str) -> dict[str, Any]:
    """Loss and gradient of the objectives that have data."""
    drawn = inputs.regression_draws()
    kind = code.ode if name == "ode" else code.diffusion
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.generator = Student(code)
    scheduler = grid(code, 5.0)
    listed = torch.cat((scheduler.timesteps, torch.tensor([0.0])))
    vars(model).update(
        args=types.SimpleNamespace(i2v=False), device="cpu", dtype=torch.float64, scheduler=scheduler,
        num_frame_per_block=inputs.BLOCK, independent_first_frame=False, teacher_forcing="teacher" in name,
        noise_augmentation_max_timestep=1000 if "noised" in name else 0,
        denoising_step_list=listed[1000 - torch.tensor([*inputs.STEPS, 0])],
    )  # fmt: skip
    text = {"prompt_embeds": torch.tensor(inputs.text()).double()}
    queue = iter(torch.tensor(drawn[x].copy()) for x in (["state"] if name == "ode" else ["index", "clean index"]))
    shape = [1, inputs.FRAMES, inputs.CHANNELS, 2 * inputs.SIDE, 2 * inputs.SIDE]
    with mock.patch.multiple(
        torch, randint=lambda *_, **__: next(queue), randn_like=lambda *_, **__: first(drawn["noise"])
    ):
        if name == "ode":
            loss, _ = model.generator_loss(first(inputs.states()), text)
        else:
            loss, _ = model.generator_loss(shape, text, text, first(inputs.states()[:, -1]))
    return {"loss": loss.item(), "gradient": inputs.projected(model.generator.plain.gradients(loss))}


def consistency(code: Any, levels: int) -> dict[str, Any]:
    """Loss and gradient of causal consistency, in float64 where the published code takes bfloat16."""
    kind = code.consistency.NaiveConsistency
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.generator, model.generator_ema, model.teacher = (
        Student(code, role=name) for name in ("student", "critic", "teacher")
    )
    for network in (model.generator, model.generator_ema, model.teacher):
        network.model.block_mask = None
    scheduler = code.schedulers.FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    scheduler.set_timesteps(num_inference_steps=levels, denoising_strength=1.0)
    vars(model).update(device="cpu", discrete_cd_N=levels, scheduler=scheduler, guidance_scale=3.0)
    text, negative = ({"prompt_embeds": torch.tensor(x).double()} for x in (inputs.text(), inputs.negative()))
    noise, average = first(inputs.regression_draws()["noise"]), types.SimpleNamespace(copy_to=lambda network: None)
    with (
        mock.patch.object(torch, "bfloat16", torch.float64),
        mock.patch.object(torch, "randn_like", return_value=noise),
        mock.patch.object(code.consistency.random, "randrange", return_value=inputs.PLACE),
    ):
        loss, _ = model.generator_loss(text, negative, first(inputs.states()[:, -1]), average)
    return {"loss": loss.item(), "gradient": inputs.projected(model.generator.plain.gradients(loss))}


def handed(role: str, last: int) -> Iterator[Any]:
    """What the published code draws for a role's loss of a bidirectional student, in its order."""
    draws = {name: first(x) for name, x in inputs.draws(role).items()}
    yield torch.tensor([inputs.FRAMES // inputs.BLOCK])  # blocks
    yield draws["noise"]
    yield torch.full((inputs.FRAMES // inputs.BLOCK,), last)  # where each ends
    for step in range(last):
        yield draws["fresh"][:, step].flatten(0, 1)
    yield torch.full((1, 1), inputs.TIME)
    yield draws["scores"]


def bidirectional(code: Any, role: str, last: int, conversion: str) -> dict[str, Any]:
    """Loss and gradient of a role of DMD."""
    shift = 8.0 if conversion == "published" else 5.0
    args = types.SimpleNamespace(independent_first_frame=False, i2v=False, denoising_loss_type="flow")
    dmd = code.dmd.DMD.__new__(code.dmd.DMD)
    torch.nn.Module.__init__(dmd)
    dmd.generator = Student(code, causal=False)
    dmd.fake_score, dmd.real_score = (Network(code, name, shift) for name in ("critic", "teacher"))
    scheduler = grid(code, 5.0)
    steps = torch.cat((scheduler.timesteps, torch.tensor([0.0])))[1000 - torch.tensor(inputs.STEPS)]
    scheduler.alphas_cumprod = None  # as the published constructor has it
    rolls = code.rolls(
        denoising_step_list=steps, scheduler=scheduler, generator=dmd.generator, num_frame_per_block=inputs.BLOCK,
        same_step_across_blocks=True,
    )  # fmt: skip
    vars(dmd).update(
        args=args, device="cpu", dtype=torch.float64, causal=False, scheduler=scheduler, denoising_step_list=steps,
        num_frame_per_block=inputs.BLOCK, same_step_across_blocks=True, num_training_frames=inputs.FRAMES,
        independent_first_frame=False, inference_pipeline=rolls, num_train_timestep=1000, min_step=20, max_step=980,
        real_guidance_scale=3.0, fake_guidance_scale=0.0, timestep_shift=5.0, ts_schedule=False,
        ts_schedule_max=False, min_score_timestep=0, denoising_loss_func=code.losses.get_denoising_loss("flow")(),
    )  # fmt: skip
    text, negative = ({"prompt_embeds": torch.tensor(x).double()} for x in (inputs.text(), inputs.negative()))
    queue = handed(role, last)
    take = lambda *_, **__: next(queue)  # noqa: E731
    shape = [1, inputs.FRAMES, inputs.CHANNELS, 2 * inputs.SIDE, 2 * inputs.SIDE]
    with (
        mock.patch.multiple(torch, randn=take, randn_like=take, randint=take),
        mock.patch.object(torch.distributed, "broadcast"),
        mock.patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        loss, _ = (dmd.generator_loss if role == "student" else dmd.critic_loss)(shape, text, negative, None)
    if next(queue, None) is not None:
        raise ValueError(f"{role}, last step {last}: not all draws were asked for")
    trained = dmd.generator if role == "student" else dmd.fake_score
    return {"loss": loss.item(), "gradient": inputs.projected(trained.plain.gradients(loss))}


def main() -> None:
    """Runs all cases."""
    of_self_forcing, of_causal_forcing = (Path(path).resolve() for path in sys.argv[1:])
    code = published(of_self_forcing)
    code.diffusion = importlib.import_module("model.diffusion").CausalDiffusion
    code.ode = importlib.import_module("model.ode_regression").ODERegression
    found = {name: regression(code, name) for name in inputs.REGRESSIONS}
    sys.modules["torchvision"] = Mocked("torchvision")
    code = published(of_causal_forcing)
    code.rolls = importlib.import_module("pipeline.bidirectional_training").BidirectionalTrainingPipeline
    pipeline: Any = sys.modules["pipeline"]
    pipeline.CausalDiffusionInferencePipeline = None
    code.consistency = importlib.import_module("model.naive_consistency")
    found |= {name: consistency(code, int(name.split()[1])) for name in inputs.CONSISTENCY}
    for case in inputs.BIDIRECTIONAL:
        found[case.name] = bidirectional(code, case.role, case.last, case.conversion)
    for name, result in found.items():
        print(name, result["loss"], flush=True)
    arrays: dict[str, Any] = {
        f"{name}/{part}": np.asarray(value) for name, result in found.items() for part, value in result.items()
    }
    np.savez_compressed(HERE / "published_stages.npz", **arrays)


if __name__ == "__main__":
    main()
