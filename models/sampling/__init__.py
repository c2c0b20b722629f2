"""Samplers, which turn noise into latents by a network's flow prediction: many-step, few-step, and block by block.

A sampler is a table of coefficients (`SamplerTable`), computed in float64 from a noise schedule; the function `sample`
runs any of them.
"""

from monarchrt.models.sampling.bidirectional import Windows, windows
from monarchrt.models.sampling.noise import Noise
from monarchrt.models.sampling.rollout import LiveRollout, Rollout, autoregressive
from monarchrt.models.sampling.schedules import (
    Schedule,
    few_step_schedule,
    shifted,
    truncated_schedule,
    uniform_schedule,
    unipc_schedule,
)
from monarchrt.models.sampling.solve import SolverState, guided, keep_context, sample, solver_step
from monarchrt.models.sampling.tables import SAMPLERS, SamplerTable, dpmpp_2m, euler, few_step, sampler_table, unipc

__all__ = [
    "SAMPLERS",
    "LiveRollout",
    "Noise",
    "Rollout",
    "SamplerTable",
    "Schedule",
    "SolverState",
    "Windows",
    "autoregressive",
    "dpmpp_2m",
    "euler",
    "few_step",
    "few_step_schedule",
    "guided",
    "keep_context",
    "sample",
    "sampler_table",
    "shifted",
    "solver_step",
    "truncated_schedule",
    "uniform_schedule",
    "unipc",
    "unipc_schedule",
    "windows",
]
