"""Several processes that work as one, each with its own devices: how they find each other, agree, and end together.

place.py      which process this is: from options, Slurm or Open MPI
service.py    the coordinator, a process of its own: calls the roll, then serves `jax.distributed`
joining.py    joins this process to the others; what one that fails does to the others
watch.py      signs of life, without which the others end
agreement.py  what one decides for all, and what all decide together
"""
