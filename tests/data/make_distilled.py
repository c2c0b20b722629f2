"""Runs published losses of a distillation on a CPU, and keeps what they give in `published_self_forcing.npz`.

    python -O -m tests.data.make_distilled SELF_FORCING MONARCH_RT

Both are checkouts at the commits that `published.md` names. Nothing of them is here: they are imported, with stand-ins
for what needs a GPU or weights. In place of their networks is `plain_wan`, of float64, and nothing flows through its
cache; draws are handed out in the order in which the published code asks for them.
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
from tests.train.objectives import plain_wan

HERE = Path(__file__).parent
STAND_INS = ("triton", "triton.language", "triton.tools.tensor_descriptor")
OF_WAN = ("tokenizers", "model", "vae", "t5", "causal_model")


class Mocked(types.ModuleType):
    """A module of which every attribute is a mock; what it decorates is one too."""

    __path__: list[str] = []  # noqa: RUF012 - of a package

    def __getattr__(self, name: str) -> Any:
        return mock.MagicMock()


def published(checkout: Path) -> types.SimpleNamespace:
    """The modules of a checkout that are run."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("model", "pipeline", "utils", "wan")]:
        del sys.modules[name]
    for name in (*STAND_INS, "wan", "wan.modules", *(f"wan.modules.{x}" for x in OF_WAN)):
        sys.modules[name] = Mocked(name)
    for name in ("model", "pipeline", "utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name)]
        sys.modules[name] = package
    pipeline: Any = sys.modules["pipeline"]
    rolls = importlib.import_module("pipeline.self_forcing_training").SelfForcingTrainingPipeline
    pipeline.SelfForcingTrainingPipeline = rolls
    pipeline.BidirectionalTrainingPipeline = pipeline.TeacherForcingTrainingPipeline = None
    modules: Any = sys.modules["wan.modules"]
    modules.__path__ = [str(checkout / "wan" / "modules")]
    found = types.SimpleNamespace(
        dmd=importlib.import_module("model.dmd"),
        base=importlib.import_module("model.base"),
        schedulers=importlib.import_module("utils.scheduler"),
        wrapper=importlib.import_module("utils.wan_wrapper").WanDiffusionWrapper,
        losses=importlib.import_module("utils.loss"),
        rolls=rolls,
        operator=None,
    )
    if (checkout / "wan" / "modules" / "monarch_attn.py").is_file():
        with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
            found.operator = importlib.import_module("wan.modules.monarch_attn")
    return found


def grid(code: Any, shift: float) -> Any:
    """The published scheduler, as its wrapper makes it."""
    scheduler = code.schedulers.FlowMatchScheduler(shift=shift, sigma_min=0.0, extra_one_step=True)
    scheduler.set_timesteps(1000, training=True)
    return scheduler


class Network(torch.nn.Module):
    """In place of the published wrapper: the flow by `plain_wan`, the clip by the published conversion."""

    def __init__(self, code: Any, role: str, shift: float):
        super().__init__()
        self.code, self.scheduler, self.uses_cache = code, grid(code, shift), role == "student"
        self.plain = plain_wan.PlainWan(inputs.model(role))
        self.model = types.SimpleNamespace(num_layers=0, num_heads=1, dim=1)  # of a cache that is not used
        self.frame_seq_len = inputs.FRAME
        self.written: dict[int, Any] = {}

    def forward(self, noisy_image_or_video, conditional_dict, timestep, **cached):
        latents, past, first = noisy_image_or_video.permute(0, 1, 3, 4, 2), None, 0
        if "kv_cache" in cached:
            place = cached.get("current_start_frame")
            first = cached["current_start"] // inputs.FRAME if place is None else place
            before = [self.written[frame] for frame in sorted(self.written) if frame < first]
            if before:
                past = [
                    tuple(torch.cat(parts, 1) for parts in zip(*layer, strict=True))
                    for layer in zip(*before, strict=True)
                ]
        flow, own = self.plain(
            latents, timestep.double(), conditional_dict["prompt_embeds"],
            positions=np.arange(first, first + latents.shape[1]), past=past,
        )  # fmt: skip
        if "kv_cache" in cached:
            self.written[first] = [tuple(x.detach() for x in layer) for layer in own]
        flow = flow.permute(0, 1, 4, 2, 3)
        convert = self.code.wrapper._convert_flow_pred_to_x0
        flat = convert(self, flow.flatten(0, 1), noisy_image_or_video.flatten(0, 1), timestep.flatten(0, 1))
        return flow, flat.unflatten(0, flow.shape[:2])


def attend_by(operator: Any, tile: tuple[int, int, int], plain: Any) -> Any:
    """The published Monarch attention with a cache, for a student's attention to itself."""

    def attend(query, key, value, keep):
        start, side = key.shape[1] - query.shape[1], inputs.SIDE
        if keep is not None or key.shape[1] == inputs.ROWS:  # of the text
            return plain(query, key, value, keep)
        how = (tile[0], side // tile[1], side // tile[2], side, side)
        arrange = operator._get_rearrange_fns(query, *how)[0]
        filled = [
            torch.cat([arrange(x[:, :start]).reshape(x[:, :start].shape), torch.zeros_like(query)], 1)
            for x in (key.detach(), value.detach())
        ]
        return operator.monarch_attn_with_kv_cache_ref(
            query, *filled, key[:, start:], value[:, start:], start, key.shape[1], *how, grad_only_new_kv=True
        )

    return attend


def handed(role: str, last: int, code: Any) -> Iterator[Any]:
    """What the published code draws for a role's loss, in its order."""
    draws = {name: torch.tensor(x).double() for name, x in inputs.draws(role).items()}
    first = {name: x.permute(*range(x.ndim - 3), -1, -3, -2) for name, x in draws.items() if x.ndim > 3}
    yield torch.tensor([inputs.FRAMES // inputs.BLOCK])  # blocks
    yield first["noise"]
    yield torch.full((inputs.FRAMES // inputs.BLOCK,), last)  # where each block ends
    for start in range(0, inputs.FRAMES, inputs.BLOCK):
        where = slice(start, start + inputs.BLOCK)
        for step in range(last):
            yield first["fresh"][:, step, where].flatten(0, 1)
        yield first["context"][:, where].flatten(0, 1)
    yield torch.full((1, 1), inputs.TIME)
    yield first["scores"]


def loss_of(code: Any, role: str, last: int, conversion: str, tile: tuple[int, int, int] | None) -> dict[str, Any]:
    """Loss and gradient of a role, as the published code has them."""
    shift = 8.0 if conversion == "published" else 5.0
    args = types.SimpleNamespace(
        mixed_precision=False, independent_first_frame=False, i2v=False, same_step_across_blocks=True,
        last_step_only=False, context_noise=0, denoising_loss_type="flow", causal=True,
    )  # fmt: skip
    dmd = code.dmd.DMD.__new__(code.dmd.DMD)
    torch.nn.Module.__init__(dmd)
    dmd.generator, dmd.fake_score, dmd.real_score = (
        Network(code, name, 5.0 if name == "student" else shift) for name in ("student", "critic", "teacher")
    )
    scheduler = grid(code, 5.0)
    listed = torch.cat((scheduler.timesteps, torch.tensor([0.0])))
    scheduler.alphas_cumprod = None  # as the published constructor has it
    vars(dmd).update(
        args=args, device="cpu", dtype=torch.float64, causal=True, scheduler=scheduler,
        denoising_step_list=listed[1000 - torch.tensor(inputs.STEPS)], num_frame_per_block=inputs.BLOCK,
        same_step_across_blocks=True, num_training_frames=inputs.FRAMES, independent_first_frame=False,
        inference_pipeline=None, num_train_timestep=1000, min_step=20, max_step=980, real_guidance_scale=3.0,
        fake_guidance_scale=0.0, timestep_shift=5.0, ts_schedule=False, ts_schedule_max=False, min_score_timestep=0,
        denoising_loss_func=code.losses.get_denoising_loss("flow")(),
    )  # fmt: skip
    of_rolls = code.rolls.__init__

    def rolls(self, *rest, **named):
        of_rolls(self, *rest, **named)
        self.num_transformer_blocks, self.frame_seq_length = 0, inputs.FRAME

    text, negative = (torch.tensor(x).double() for x in (inputs.text(), inputs.negative()))
    queue = handed(role, last, code)
    take = lambda *_, **__: next(queue)  # noqa: E731
    shape = [1, inputs.FRAMES, inputs.CHANNELS, 2 * inputs.SIDE, 2 * inputs.SIDE]
    plain = plain_wan.attend
    whole = plain if tile is None else attend_by(code.operator, tile, plain)
    of_student = dmd.generator.forward

    def student(*rest, **named):
        with mock.patch.object(plain_wan, "attend", whole):
            return of_student(*rest, **named)

    dmd.generator.forward = student
    with (
        mock.patch.object(code.rolls, "__init__", rolls),
        mock.patch.multiple(torch, randn=take, randn_like=take, randint=take),
        mock.patch.object(torch.distributed, "broadcast"),
        mock.patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        loss, _ = (dmd.generator_loss if role == "student" else dmd.critic_loss)(
            shape, {"prompt_embeds": text}, {"prompt_embeds": negative}, None
        )
    if next(queue, None) is not None:
        raise ValueError(f"{role}, last step {last}: not all draws were asked for")
    trained = dmd.generator if role == "student" else dmd.fake_score
    return {"loss": loss.item(), "gradient": inputs.projected(trained.plain.gradients(loss))}


def main() -> None:
    """Runs all cases."""
    of_self_forcing, of_monarch = (Path(path).resolve() for path in sys.argv[1:])
    found = {}
    for checkout, cases in ((of_self_forcing, inputs.DENSE), (of_monarch, inputs.MONARCH)):
        code = published(checkout)
        for case in cases:
            result = loss_of(code, case.role, case.last, case.conversion, case.tile)
            print(case.name, result["loss"], flush=True)
            found |= {f"{case.name}/{name}": np.asarray(value) for name, value in result.items()}
    np.savez_compressed(HERE / "published_self_forcing.npz", **found)


if __name__ == "__main__":
    main()
