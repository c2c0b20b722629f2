"""The distillation runs of `monarchrt demo --distill`, which train four-step students. Does not import JAX."""

import dataclasses

from monarchrt.train.config import ModelConfig, OptimizerConfig, RoleConfig, RunConfig, TrainConfig
from monarchrt.train.demo.config import DemoConfig, dense_run
from monarchrt.train.objectives.settings import DMDConfig, SelfForcingConfig

SHIFT = 3.0  # timestep shift, that of the teacher's training
BLOCK = 1  # latent frames per block of a causal student
EVERY = 4  # updates of the critic per update of the student
# the large learning rates make parameters change a lot per update; networks are sampled with their moving average
_STUDENT = OptimizerConfig(learning_rate=1e-3, beta1=0.0, beta2=0.99, warmup=10, ema_decay=0.98)
_CRITIC = OptimizerConfig(learning_rate=4e-3, beta1=0.0, beta2=0.99, ema_decay=None)


def distillations(config: DemoConfig) -> dict[str, TrainConfig]:
    """The runs after the dense one with `--distill`, by the name of their folder.

    dmd           a four-step Monarch student of the dense teacher
    dmd-dense     the same with dense attention, and the same batches, draws and steps
    causal        the dense teacher finetuned to be causal, with Monarch attention, sampled in many steps
    self-forcing  a causal four-step Monarch student, initialized from it; more training steps did not improve it

    Args:
        config: The settings of the demo.

    Returns:
        The settings of the runs, in this order.
    """
    dense = dense_run(config)
    monarch = dataclasses.replace(dense.model, attention="monarch", tile=config.tile)
    frame = (BLOCK, *config.tile[1:])
    causal = dataclasses.replace(
        dense.model,
        attention="monarch",
        tile=frame,
        overrides=(*dense.model.overrides, f"causal_block={BLOCK}"),
    )

    def few(steps: int) -> RunConfig:
        return dataclasses.replace(dense.run, steps=steps, eval_every=steps, eval_windows=4, eval_timesteps=1)

    roles = {
        "critic": RoleConfig(model=dense.model, optimizer=_CRITIC),
        "teacher": RoleConfig(model=dense.model, optimizer=None, init_from=dense.run.folder),
    }

    def student(name: str, model: ModelConfig, steps: int) -> TrainConfig:
        return TrainConfig(
            data=dense.data,
            model=model,
            objective=DMDConfig(shift=SHIFT, student_every=EVERY),
            optimizer=_STUDENT,
            run=dataclasses.replace(few(steps), folder=config.folder / name),
            roles=roles,
        )

    causal_run = dataclasses.replace(
        dense,
        model=causal,
        optimizer=dataclasses.replace(dense.optimizer, learning_rate=2e-3),
        run=dataclasses.replace(
            few(config.finetune_steps), folder=config.folder / "causal", init_from=dense.run.folder
        ),
    )
    forced = dataclasses.replace(
        student("self-forcing", causal, max(1, config.distill_steps // 3)),
        objective=SelfForcingConfig(shift=SHIFT, student_every=EVERY, block=BLOCK),
    )
    forced = dataclasses.replace(forced, run=dataclasses.replace(forced.run, init_from=causal_run.run.folder))
    return {
        "dmd": student("dmd", monarch, config.distill_steps),
        "dmd-dense": student("dmd-dense", dense.model, config.distill_steps),
        "causal": causal_run,
        "self-forcing": forced,
    }
