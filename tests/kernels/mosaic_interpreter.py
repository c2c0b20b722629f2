"""Runs the Mosaic GPU kernels on a CPU: adds to JAX's interpreter (0.11) what the kernels use and it lacks.

Added: a register operand of wgmma, and accumulators that start from a value. The interpreter gives each view of shared
memory bytes of its own, so here a tile has one view; that the views are the same bytes on a card is for GPU tests.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src import core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.state import discharge
from jax._src.state.types import AbstractRef

from monarchrt.pallas_kernels.sm90 import e4m3_cells, shared
from monarchrt.pallas_kernels.sm90.config import SLAB


def _allocate(interpreter, token, value, source):
    """A register buffer that holds `value`."""
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=interpreter.thread,
        memory_space_id=shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=source,
    )


def _free(interpreter, token, key, source):
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        allocation_key_as_array=key,
        source_info=source,
    )


def _is_ref(atom) -> bool:
    return isinstance(atom.aval, AbstractRef)


def _run_state(interpreter, eqn, token, values):
    """A state that starts from values: a buffer for each, the body, and what the buffers then hold."""
    keys = []
    for variable, value in zip(eqn.invars, values, strict=True):
        if not _is_ref(variable):
            token, value = _allocate(interpreter, token, value, eqn.source_info)
        keys.append(value)
    token, _ = interpreter.interpret(eqn.params["jaxpr"], token, *keys)
    results = []
    for variable, key, out in zip(eqn.invars, keys, eqn.outvars, strict=True):
        if _is_ref(variable):
            results.append(key)
            continue
        token, value = gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(out.aval.shape, out.aval.dtype),
            mesh_location=interpreter.mesh_location,
            thread=interpreter.thread,
            allocation_key_as_array=key,
            transforms=(),
            source_info=eqn.source_info,
        )
        token = _free(interpreter, token, key, eqn.source_info)
        results.append(value)
    return token, results


def _wgmma(interpreter, eqn, token, values):
    """A register operand becomes a buffer, and the interpreter's own product does the rest."""
    accumulator, left, right, *leaves = values
    token, key = _allocate(interpreter, token, left, eqn.source_info)
    token, out = interpreter._interpret_wgmma_ref_p(eqn, token, lambda: [accumulator, key, right, *leaves])
    return _free(interpreter, token, key, eqn.source_info), out


def _rule(eqn):
    if eqn.primitive is discharge.run_state_p and all(eqn.params["is_initialized"]):
        return _run_state
    if eqn.primitive is primitives.wgmma_ref_p and not _is_ref(eqn.invars[1]):
        return _wgmma
    return None


def _interpret(original):
    def interpret(self, jaxpr, token, *args):
        if not any(_rule(eqn) for eqn in jaxpr.eqns):
            return original(self, jaxpr, token, *args)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            outvars = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
            if rule := _rule(eqn):
                token, out = rule(self, eqn, token, [read(v) for v in eqn.invars])
                out = [x for v, x in zip(eqn.outvars, out, strict=False) if not isinstance(v, core.DropVar)]
            else:  # one equation as a program of its own
                inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
                single = jaxpr.replace(
                    constvars=(),
                    invars=inputs,
                    outvars=outvars,
                    eqns=[eqn],
                    debug_info=jaxpr.debug_info.with_unknown_names(),
                )
                token, out = original(self, single, token, *map(read, inputs))
            values.update(zip(outvars, out, strict=True))
        return token, [read(v) for v in jaxpr.outvars]

    return interpret


@dataclasses.dataclass(frozen=True)
class _Packs:
    """Tiles [slots, slabs, 64, slab] whose rows are copied as [packed, rows]; stands for the third view."""

    tile: Any
    slot: Any = None
    split: tuple[int, int] = (1, 1)

    at = property(lambda self: self)

    def __getitem__(self, slot):
        return dataclasses.replace(self, slot=slot)

    def transpose(self, axes):
        """The kernels ask for [packed, rows, slabs, slab]."""
        assert axes == (1, 2, 0, 3)
        return self


def _scratch(shapes, dtype, slab, split=None, also=()):
    del slab
    _scratch.split = split
    found = tuple(plgpu.SMEM(shape, dtype) for shape in shapes)
    return (found, *(tuple(plgpu.SMEM(shape, x) for shape in shapes) for x in also)) if also else found


def _views(scratch):
    if isinstance(scratch[0], tuple):
        return scratch[0], *scratch
    if _scratch.split is None:
        return scratch, scratch
    return scratch, scratch, tuple(_Packs(tile, split=_scratch.split) for tile in scratch)


def _copy_in(original):
    """Copies of split rows, done by plain loads and stores; boxes that reach past the tiles are cut here."""

    def copy(source, target, barrier, **options):
        if not isinstance(target, _Packs):
            return original(source, target, barrier, **options)
        value = source[...]  # [packed, rows, slabs, slab]
        packed, rows, slabs, slab = value.shape
        target.tile[target.slot] = value.transpose(2, 0, 1, 3).reshape(slabs, packed * rows, slab)
        plgpu.barrier_arrive(barrier)

    return copy


def _copy_out(original):
    def copy(source, target, **options):
        if not isinstance(source, _Packs):
            return original(source, target, **options)
        value = source.tile[source.slot]  # [slabs, 64, slab]
        slabs, _, slab = value.shape
        target[...] = value.reshape(slabs, *source.split, slab).transpose(1, 2, 0, 3)

    return copy


def _convert(raw, cells, *, depth, dim):
    """For PTX that turns a tile from 8 bits into 16."""
    del depth
    value = raw[...].astype(cells.dtype)
    for n in range(dim // SLAB):
        cells[n] = value[:, n * SLAB : (n + 1) * SLAB]


@contextlib.contextmanager
def interpreted(monkeypatch, *, detect_races: bool = False):
    """Inside, Mosaic GPU kernels run in the interpreter; yields a function that says whether a race was seen."""
    monkeypatch.setattr(JaxprInterpreter, "interpret", _interpret(JaxprInterpreter.interpret))
    monkeypatch.setattr(shared, "tile_scratch", _scratch)
    monkeypatch.setattr(shared, "tile_views", _views)
    monkeypatch.setattr(e4m3_cells, "convert", _convert)
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", _copy_in(plgpu.copy_gmem_to_smem))
    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", _copy_out(plgpu.copy_smem_to_gmem))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield lambda: interpret_pallas_call.get_races().races_found
