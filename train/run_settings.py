"""The settings of a run: its folder, length, devices, logs and checkpoints. Does not import JAX."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from monarchrt.models.bounds import check_bounds
from monarchrt.models.errors import require
from monarchrt.models.mesh import MeshShape
from monarchrt.models.processes.place import check_options
from monarchrt.train.bounds import WHOLE_NUMBERS


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: its folder, length, devices, logs and checkpoints."""

    folder: Path = Path("runs/train")
    """Run folder: config.json, log.jsonl, tensorboard/, checkpoints/, samples/."""

    resume: bool = False
    """Continue from the newest readable checkpoint in the folder. Settings that are not given come from its
    config.json; model, tile and data must be the checkpoint's."""

    init_from: Path | None = None
    """Start from the parameters of another run folder (their moving average, if it has one), for example to
    finetune a dense model with MonarchAttention; or from a Wan checkpoint that `monarchrt inspect` can read."""

    steps: int = 200
    """Total number of optimizer steps."""

    batch: int = 4
    """Samples per step: windows of clips, latents or prompts."""

    seed: int = 0
    """Seed of the initial parameters, the noise and the order of the data."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute dtype of the network; parameters, optimizer, softmax and loss stay in fp32."""

    sharding: Literal["replicated", "fsdp"] = "replicated"
    """With several devices, each takes an equal part of the batch and holds the whole state (replicated) or a part of
    it (fsdp). Short for a mesh with one axis."""

    mesh: str | None = None
    """The devices as a mesh with named axes, such as `data=2,fsdp=4,heads=2`: data splits the batch; fsdp the batch
    and the state; heads each clip, by tokens outside attention and by heads inside. -1: the remaining devices. A run
    may be resumed with another mesh."""

    coordinator: str | None = None
    """For a run on several processes, each with its own devices: address of process 0 and a free port, such as
    `10.0.0.1:1234`. Under Slurm's srun and Open MPI's mpirun this and the next two are found automatically."""

    processes: int | None = None
    """Number of processes; requires coordinator. 1 without it: a separate run, even under a job manager."""

    process: int | None = None
    """Number of this process, from 0; requires coordinator."""

    prefetch: int = 2
    """Batches that a thread reads and moves to the devices ahead of the step that uses them; 0: none."""

    log_every: int = 1
    """Write loss, gradient norm and learning rate every this many steps."""

    eval_every: int = 50
    """Measure the held-out loss every this many steps, and at the end."""

    eval_windows: int = 4
    """Held-out windows to evaluate on, spread over the held-out part."""

    eval_timesteps: int = 8
    """Noise levels to evaluate at, spread evenly over the training distribution."""

    sample_every: int = 0
    """Every this many steps, write an mp4 with a held-out window, its reconstruction from noise level 0.6, and a sample
    from pure noise, each with and without the moving average. Latents and prompts need `components`, whose VAE decodes
    them. 0: never."""

    times_every: int = 0
    """After the first step and every this many, log how long the parts of each role's update take, such as
    `student/seconds_roll_out`, `_scores`, `_backward`, `_optimizer`. They are separate programs, which are compiled
    once and then take about as long as two steps. 0: never."""

    checkpoint_every: int = 50
    """Save a checkpoint every this many steps, and at the end."""

    keep: int = 3
    """Checkpoints to keep, newest first."""

    wandb: str | None = None
    """Also log to this Weights & Biases project (`pip install wandb`; with WANDB_MODE=offline its files stay in the run
    folder). log.jsonl and TensorBoard are always written."""

    def __post_init__(self) -> None:
        check_bounds(self, WHOLE_NUMBERS)
        require(self.wandb is None or bool(self.wandb.strip()), "wandb is empty; give the name of a project")
        if self.mesh is not None:
            MeshShape.parse(self.mesh)
            plain = self.sharding == "replicated"
            require(plain, f"sharding is {self.sharding}, but mesh {self.mesh} defines it too; leave one of them out")
        check_options(self.coordinator, self.processes, self.process)
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in [0, 2**32)")
