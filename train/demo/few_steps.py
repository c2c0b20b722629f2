"""The training runs of `monarchrt demo --distill`: from the demo's dense teacher to students of four steps. No JAX."""

import dataclasses

from monarchrt.train.config import ModelConfig, OptimizerConfig, RoleConfig, TrainConfig
from monarchrt.train.demo.config import DemoConfig, dense_run
from monarchrt.train.objectives.settings import DMDConfig, SelfForcingConfig

SHIFT = 3.0  # of the teacher's training
BLOCK = 1  # latent frames of a causal student's block
_STUDENT = OptimizerConfig(learning_rate=1e-3, beta1=0.0, beta2=0.99, warmup=10, ema_decay=0.95)
_CRITIC = OptimizerConfig(learning_rate=2e-3, beta1=0.0, beta2=0.99, ema_decay=None)


def distillations(config: DemoConfig) -> dict[str, TrainConfig]:
    """What follows the dense run with `--distill`, by the name of its folder.

    dmd          a Monarch student of four steps, made of the dense teacher
    dmd-dense    the same with dense attention: same batches, draws and steps
    causal       the dense teacher finetuned to see earlier frames only, with Monarch attention, many steps
    self-forcing a causal Monarch student of four steps, made of that

    Args:
        config: The demo's settings.

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
    few = dataclasses.replace(
        dense.run, steps=config.distill_steps, eval_every=config.distill_steps, eval_windows=4, eval_timesteps=1
    )
    roles = {
        "critic": RoleConfig(model=dense.model, optimizer=_CRITIC),
        "teacher": RoleConfig(model=dense.model, optimizer=None, init_from=dense.run.folder),
    }

    def student(name: str, model: ModelConfig) -> TrainConfig:
        return TrainConfig(
            data=dense.data,
            model=model,
            objective=DMDConfig(shift=SHIFT, student_every=2),
            optimizer=_STUDENT,
            run=dataclasses.replace(few, folder=config.folder / name),
            roles=roles,
        )

    begun = dataclasses.replace(
        dense,
        model=causal,
        optimizer=dataclasses.replace(dense.optimizer, learning_rate=2e-3),
        run=dataclasses.replace(
            few, folder=config.folder / "causal", init_from=dense.run.folder, steps=config.finetune_steps
        ),
    )
    forced = dataclasses.replace(
        student("self-forcing", causal),
        objective=SelfForcingConfig(shift=SHIFT, student_every=2, block=BLOCK),
    )
    forced = dataclasses.replace(forced, run=dataclasses.replace(forced.run, init_from=begun.run.folder))
    return {
        "dmd": student("dmd", monarch),
        "dmd-dense": student("dmd-dense", dense.model),
        "causal": begun,
        "self-forcing": forced,
    }
