"""Faults of distillation, which `faults.py` has among its own."""

from tests.mutants.fault import Fault

CONSISTENCY = ("tests/train/objectives/test_consistency.py",)
DISTILLATION = ("tests/train/objectives/test_distillation.py",)
DEMO = ("tests/train/test_demo_distill.py",)
ODE = ("tests/train/objectives/test_ode.py",)

DISTILLING = (
    Fault(
        "train/objectives/consistency.py",
        "nearest_level(t, shift=settings.shift)",
        "nearest_level(t, shift=5.0)",
        CONSISTENCY,
        "made_of_a_flow",
    ),
    Fault(
        "train/objectives/dmd.py",
        'critic=detached(networks["critic"]),\n            teacher',
        'critic=detached(networks["teacher"]),\n            teacher',
        DISTILLATION,
        "of_its_settings",
    ),
    Fault(
        "train/objectives/self_forcing.py",
        "step=jnp.int32(len(self.settings.student_steps))",
        "step=jnp.int32(0)",
        DISTILLATION,
        "after_all_steps",
    ),
    Fault(
        "train/demo/distil.py",
        "{name: result.model for",
        "{name: nnx.merge(result.graphs['student'], (own := result.state.roles['student']).params, own.frozen) for",
        DEMO,
        "it_is_the_average",
    ),
    Fault("train/demo/few_steps.py", "ema_decay=0.98", "ema_decay=None", DEMO, "it_is_the_average"),
    Fault(
        "train/pair_folder.py",
        "dataclasses.replace(made, seed=self.made.seed) != self.made",
        "made.sigmas != self.made.sigmas",
        ODE,
        "made_alike",
    ),
)
