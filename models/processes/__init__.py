"""Runs of several processes, each with its own devices: they find each other, agree on values, and end together.

place.py      which process this is, from options, Slurm or Open MPI
service.py    the coordinator, a separate process: checks who has joined, then runs the service of `jax.distributed`
joining.py    joins this process to the run; a failure here ends the others
watch.py      heartbeats; a process without them ends the others
agreement.py  exchanges values, waits, and stops together
alike.py      compares what each process has read: files, data, settings
identity.py   versions and settings that must be equal in all processes
arrays.py     gives all processes the arrays of process 0
programs.py   compiles a program in all processes before any runs it
"""
