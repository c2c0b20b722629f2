"""Times the published PyTorch Self-Forcing updates for `distill.py`, in a process of its own.

Takes a checkout of the repository guandeh17/Self-Forcing and needs torch with CUDA. Its classes `DMD` and
`SelfForcingTrainingPipeline`, its networks and its FSDP wrapping run as they are, with random weights. What is put in
from outside: base classes of diffusers; networks that are made, not read; attention by SDPA, its own fallback, since
flash_attn may be missing; no text encoder and no VAE; a last step that is given. The average is left out, which the
published code keeps on the CPU from step 200 on. Prints seconds and peak memory of both updates as JSON.
"""

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TRUE = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
SMALL = {"dim": 1536, "ffn_dim": 64, "num_heads": 12, "num_layers": 1}  # the published caches have 12 heads of 128
TEXT = (1, 512, 4096)


class Untrained(torch.nn.Module):
    """In place of diffusers' `ModelMixin`, what the published networks use of it."""

    def enable_gradient_checkpointing(self):
        """As diffusers does."""
        self._set_gradient_checkpointing(self, True)  # type: ignore[operator]


def module(name: str, **values: Any) -> Any:
    """Puts a module in place of one that is not needed."""
    made: Any = types.ModuleType(name)
    vars(made).update(values)
    sys.modules[name] = made
    return made


def published(path: Path, sizes: dict[str, int], device: Any) -> tuple[Any, Any]:
    """The published module of the updates, and the class that rolls out for them."""
    sys.path.insert(0, str(path))
    module("diffusers")
    module("diffusers.configuration_utils", ConfigMixin=object, register_to_config=lambda init: init)
    module("diffusers.models")
    module("diffusers.models.modeling_utils", ModelMixin=Untrained)
    for package in ("wan", "wan.modules", "model"):  # whose __init__ import all there is
        module(package).__path__ = [str(path.joinpath(*package.split(".")))]
    module("wan.modules.tokenizers", HuggingfaceTokenizer=None)
    module("wan.modules.t5", umt5_xxl=None)
    module("wan.modules.vae", _video_vae=None)
    networks: Any = importlib.import_module("wan.modules.model")
    networks.flash_attention = importlib.import_module("wan.modules.attention").attention
    causal = importlib.import_module("wan.modules.causal_model")
    for kind in (networks.WanModel, causal.CausalWanModel):
        kind.from_pretrained = classmethod(functools.partial(make_network, sizes=sizes, device=device))
    pipeline = module("pipeline")
    pipeline.__path__ = [str(path / "pipeline")]
    training = importlib.import_module("pipeline.self_forcing_training")
    pipeline.SelfForcingTrainingPipeline = training.SelfForcingTrainingPipeline
    base: Any = importlib.import_module("model.base")
    base.WanTextEncoder = base.WanVAEWrapper = torch.nn.Identity
    return importlib.import_module("model.dmd"), training.SelfForcingTrainingPipeline


def make_network(kind: Any, _path: str, *, sizes: dict[str, int], device: Any, **options: Any) -> Any:
    """A network with random weights, of its head too, which starts at zero."""
    with torch.device(device):
        network = kind(in_dim=16, out_dim=16, text_len=TEXT[1], text_dim=TEXT[2], freq_dim=256, **sizes, **options)
    torch.nn.init.normal_(network.head.head.weight, std=0.02)
    return network


def settings(shape: tuple[int, ...]) -> Any:
    """Those of the published configs/self_forcing_dmd.yaml, with a teacher of the student's size."""
    return types.SimpleNamespace(
        mixed_precision=True, denoising_step_list=[1000, 750, 500, 250], warp_denoising_step=True,
        model_kwargs={"timestep_shift": 5.0}, num_frame_per_block=3, independent_first_frame=False,
        same_step_across_blocks=True, last_step_only=False, num_training_frames=21, context_noise=0, i2v=False,
        gradient_checkpointing=True, num_train_timestep=1000, guidance_scale=3.0, timestep_shift=5.0,
        ts_schedule=False, denoising_loss_type="flow", image_or_video_shape=list(shape),
    )  # fmt: skip


def build(args: argparse.Namespace, device: Any) -> tuple[Any, dict[str, Any]]:
    """The published model with its three networks, and an optimizer of each that trains."""
    shape = (1, 21, 16, 8, 8) if args.small else (1, 21, 16, 60, 104)
    dmd, rolls = published(args.path, SMALL if args.small else TRUE, device)
    rolls.generate_and_sync_list = lambda self, blocks, steps, device: [args.last] * blocks
    own = rolls.__init__

    def init(self, **options):
        own(self, **options)
        if args.small:
            self.num_transformer_blocks, self.frame_seq_length = SMALL["num_layers"], 16
            self.kv_cache_size = 21 * 16

    rolls.__init__ = init
    model = dmd.DMD(settings(shape), device=device)
    roles = {"student": "generator", "critic": "fake_score", "teacher": "real_score"}
    if args.small:
        model.to(torch.bfloat16)
        for name in roles.values():
            getattr(model, name).seq_len = 21 * 16
    else:
        wrap = importlib.import_module("utils.distributed").fsdp_wrap
        for name in roles.values():
            setattr(model, name, wrap(getattr(model, name), mixed_precision=True))
    options = {"student": 2e-6, "critic": 4e-7}
    return model, {
        role: torch.optim.AdamW(
            [x for x in getattr(model, roles[role]).parameters() if x.requires_grad],
            lr=rate, betas=(0.0, 0.999), weight_decay=0.01,
        )
        for role, rate in options.items()
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--last", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="one layer, on a CPU: whether it runs")
    args = parser.parse_args()
    device = "cpu" if args.small else "cuda"
    if args.small:
        torch.set_num_threads(1)
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    backend, place = ("gloo", "tcp://127.0.0.1:29531") if args.small else ("nccl", "tcp://127.0.0.1:29532")
    dist.init_process_group(backend, init_method=place, rank=0, world_size=1)
    torch.manual_seed(0)
    model, optimizers = build(args, torch.device(device))
    model.eval()  # as in the published loop
    text = {"prompt_embeds": torch.randn(TEXT, device=device, dtype=torch.bfloat16)}
    negative = {"prompt_embeds": torch.randn(TEXT, device=device, dtype=torch.bfloat16)}
    networks = {"student": model.generator, "critic": model.fake_score}
    losses = {"student": model.generator_loss, "critic": model.critic_loss}

    def wait():
        if not args.small:
            torch.cuda.synchronize()

    def update(role):
        optimizers[role].zero_grad(set_to_none=True)
        loss, _ = losses[role](
            image_or_video_shape=list(model.args.image_or_video_shape), conditional_dict=text,
            unconditional_dict=negative, clean_latent=None,
        )  # fmt: skip
        loss.backward()
        if args.small:
            torch.nn.utils.clip_grad_norm_(networks[role].parameters(), 10.0)
        else:
            networks[role].clip_grad_norm_(10.0)
        optimizers[role].step()
        return loss

    report: dict[str, Any] = {"torch": torch.__version__}
    for role in losses:
        seconds = []
        for _ in range(args.repeats + 1):
            wait()
            if not args.small:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = update(role)
            wait()
            seconds.append(time.perf_counter() - start)
        memory = 0 if args.small else torch.cuda.max_memory_allocated()
        report[role] = {
            "seconds": statistics.median(seconds[1:]), "memory_gb": memory / 1e9, "finite": bool(loss.isfinite()),
        }  # fmt: skip
    dist.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
