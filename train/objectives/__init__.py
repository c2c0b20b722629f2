"""What a run trains: an objective per file, with the roles of its networks, its draws and its losses.

registry.py    what a role is, and the table of objectives
settings.py    the settings of each objective, with its roles, and its row in the table; no JAX, so that help is quick
base.py        what an objective does, for the trainer that knows none of them
flow.py        rectified flow, also with a noise level per frame or block of frames (diffusion forcing)
teacher_forcing.py  the same for blocks that see the clean blocks before them
ode.py         regression of the end of a teacher's trajectory, from pairs
consistency.py agreement along a teacher's flow, without pairs
dmd.py         distribution matching of a student of few steps
self_forcing.py  the same of a causal student on its own roll-outs
scores.py      what both compare: the losses of student and critic
"""
