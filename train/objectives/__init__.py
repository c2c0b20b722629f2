"""Training objectives, one per module: the roles of the networks, the random draws and the losses.

registry.py         roles, and the table of objectives
settings.py         settings, roles and table entry of each objective; without JAX, so that help is quick
base.py             the interface of objectives, through which the trainer uses them
flow.py             rectified flow, optionally with a noise level per frame or block of frames (diffusion forcing)
teacher_forcing.py  rectified flow of blocks that attend to the clean blocks before them
ode.py              regression of the end of a teacher's trajectory, from stored pairs
consistency.py      consistency distillation along a teacher's flow, without stored pairs
dmd.py              distribution matching distillation of a few-step student
self_forcing.py     distribution matching of a causal student on its own roll-outs
scores.py           the losses of student and critic in both kinds of distribution matching
adversarial.py      the adversarial term of distribution matching; discriminator.py has its network
by_blocks.py        gradients of a clip that was generated block by block
"""
