"""Tiled Monarch attention as Mosaic GPU kernels, a backend of `monarch_jax`: knows tiles, never grids or layouts."""


def supports(problem, q, k) -> str | None:
    """Why the kernels cannot serve a call, or None when they can."""
    return "the Mosaic GPU kernels are not written yet; use implementation='xla' or None."


def forward(problem, q, k, v, visible):
    """Not written yet; `supports` says so for every call."""
    raise NotImplementedError(supports(problem, q, k))


def vjp(problem, residuals, d_out):
    """Not written yet; `supports` says so for every call."""
    raise NotImplementedError(supports(problem, residuals.q, residuals.k))
