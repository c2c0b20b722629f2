"""Causal 3x3x3 convolution on Hopper, with wgmma and TMA: no pixels are put side by side in memory.

out[t, h, w] = bias + added[t, h, w] + sum over k, i, j of x[t + k - 2, h + i - 1, w + j - 1] @ kernel[k, i, j], with
frames before the first from `past` and zeros around each frame; or of each frame by itself, by a kernel of 1x3x3. A
frame's rows are 8 segments, one below the other; the 8 pixels at the same place of each segment are 8 rows of an
operand, so a shift by one pixel is one by a whole tile of shared memory. A block loads a patch of pixels with its rim
once, for 9 of the kernel's steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from monarch_jax.devices import cuda_capability
from monarchrt.pallas_kernels.sm90.config import CAPABILITY, ROWS
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, Role, launch, specialised
from monarchrt.pallas_kernels.sm90.shared import accumulate
from monarchrt.pallas_kernels.sm90.types import Index, Ref, Refs

SEGMENTS = 8  # of a frame's rows
SLAB = 32  # channels of a row of shared memory
STEPS = 3  # of the kernel in each direction
OUT = 96  # channels out of a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Sizes of the kernel.

    Attributes:
        rows: Of a segment, of a block's patch of pixels.
        columns: Of that patch, a multiple of 8.
        out: Output channels of a block.
        groups: Computing warpgroups, among which the patch is divided.
        patches: Patches in shared memory.
        kernels: Thirds of a kernel's step in time in shared memory; 4 rather than 3 take 4 to 6% less time on an H200.
        blocks: That share the work.
        registers: Of a thread that computes, and of one that loads.
    """

    rows: int = 6
    columns: int = 8
    out: int = OUT
    groups: int = 3
    patches: int = 2
    kernels: int = 4
    blocks: int = 132
    registers: tuple[int, int] = (152, 40)

    @property
    def units(self) -> int:
        """Operands of 64 pixels, 8 columns of each segment, that a warpgroup has."""
        return self.rows * self.columns // 8 // self.groups

    @property
    def slabs(self) -> int:
        """Slabs of output channels."""
        return self.out // SLAB

    def box(self, unit: Index) -> tuple[Index, Index]:
        """First row and column, in the patch, of an operand."""
        across = self.columns // 8
        return lax.div(unit, across), lax.rem(unit, across) * 8


def norms(kernel: tuple[int, ...]) -> bool:
    """Whether a block has all channels of the output, so that it can normalise them."""
    return kernel[4] == OUT


def measured(kernel: tuple[int, ...]) -> bool:
    """Whether the kernel was quicker than XLA on an H200: with 192, 96 and, of 96, 3 channels out; not with 384.

    Of frames by themselves, of 96 to 9 channels: quicker than the last of these, whose three steps in time they are.
    """
    if kernel[0] == 1:
        return kernel[3:] == (OUT, 9)
    return kernel[4] in (OUT, 2 * OUT) or kernel[3:] == (OUT, 3)


def supports(x: "jax.ShapeDtypeStruct | jax.Array", kernel: tuple[int, ...]) -> str | None:
    """Why the kernel cannot serve a convolution where JAX runs by default, or None when it can.

    Args:
        x: [B, T, H, W, C], shape and dtype.
        kernel: Shape of the weights, (3, 3, 3, C, D), or (1, 3, 3, C, D).

    Returns:
        The reason, or None.
    """
    capability = cuda_capability()
    if capability is not None and int(capability) != CAPABILITY:
        return f"the GPU has compute capability {capability}; the kernel is for Hopper's {CAPABILITY}.0 alone."
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the frames are {x.dtype}; the tensor cores take bfloat16 or float16."
    if kernel[:3] not in ((STEPS,) * 3, (1, STEPS, STEPS)):
        return f"a kernel of {kernel[:3]} is not one of {(STEPS,) * 3}, nor of {(1, STEPS, STEPS)}."
    if kernel[3] % SLAB or (kernel[4] % OUT and kernel[4] > SLAB):
        return f"{kernel[3]} and {kernel[4]} channels in and out are no multiples of {SLAB} and {OUT}, nor few out."
    if x.shape[2] % SEGMENTS or x.shape[3] % 8 or x.shape[2] < SEGMENTS * ConvConfig.rows:
        return f"frames of {x.shape[2]}x{x.shape[3]} are not of {SEGMENTS} equal segments and columns by eights."
    return None


@functools.partial(jax.jit, static_argnames=("both", "config"))  # of equal shapes, traced and lowered once
def convolution(
    past: Float[Array, "2 H W C"] | None,
    x: Float[Array, "T H W C"],
    kernel: Float[Array, "times 3 3 C D"],
    bias: Float[Array, " D"],
    added: Float[Array, "T H W D"] | None = None,
    gamma: Float[Array, " D"] | None = None,
    *,
    both: bool = False,
    config: ConvConfig | None = None,
) -> tuple[Float[Array, "T H W D"], ...]:
    """Convolves frames as the continuation of a past, and adds a bias and frames; then norm and SiLU, if wanted.

    Args:
        past: The two frames before; None, with a kernel of one step in time.
        x: Frames, bfloat16 or float16, of a shape that `supports` accepts.
        kernel: Weights, of x's dtype; times is 3 or 1.
        bias: Of each output channel.
        added: Frames to add.
        gamma: Weights of a norm over channels, x / |x| * sqrt(D) * gamma, that SiLU follows; None: neither. All
            channels are then a block's (`norms`).
        both: Whether what is normalised is wanted too.
        config: Sizes; None: the measured ones.

    Returns:
        As many frames, in x's dtype, from sums in float32; with `both`, those before the norm and those after it.
    """
    frames, height, width, channels = x.shape
    if (past is None) != (kernel.shape[0] == 1):
        raise ValueError(f"kernel has {kernel.shape[0]} steps in time; give past with {STEPS}, None with 1.")
    config = config or ConvConfig(out=OUT if kernel.shape[-1] > SLAB else SLAB)
    if kernel.shape[-1] < config.out and gamma is None:
        return _with_zeros(past, x, kernel, bias, added, config)
    out, segment = kernel.shape[-1], height // SEGMENTS
    vectors = [bias] if gamma is None else [bias, gamma.astype(jnp.float32) * out**0.5]
    # step in time and slab of channels, row, column, D, C of the slab: as shared memory has them
    thin = kernel.reshape(*kernel.shape[:3], channels // SLAB, SLAB, out).transpose(0, 3, 1, 2, 5, 4)
    inputs = [
        (x if past is None else past).reshape(-1, SEGMENTS, segment, width, channels),
        x.reshape(-1, SEGMENTS, segment, width, channels),
        thin.reshape(-1, STEPS, STEPS, out, SLAB),
        jnp.stack([x.astype(jnp.float32) for x in vectors]).reshape(len(vectors), -1, SLAB),
    ]
    if added is not None:
        inputs.append(added.astype(x.dtype).reshape(-1, SEGMENTS, segment, width, out))
    if gamma is not None and out != config.out:
        raise ValueError(f"gamma is given, but a block has {config.out} of {out} channels.")
    if both and gamma is None:
        raise ValueError("both=True asks for frames before and after a norm; give gamma.")
    items = _Items(
        times=kernel.shape[0],
        frames=frames,
        segment=segment,
        width=width,
        channels=channels,
        out=out,
        added=added is not None,
        normed=gamma is not None,
        both=both,
        config=config,
    )
    return tuple(y.reshape(frames, height, width, out) for y in launch(_role(items, x.dtype), inputs))


def _with_zeros(
    past: Array | None, x: Array, kernel: Array, bias: Array, added: Array | None, config: ConvConfig
) -> tuple[Array]:
    out = kernel.shape[-1]
    wide = [
        None if y is None else jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, config.out - out)])
        for y in (kernel, bias, added)
    ]
    return (convolution(past, x, *wide, config=config)[0][..., :out],)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Items:
    """The work: a patch of a frame and some output channels are an item."""

    times: int
    frames: int
    segment: int
    width: int
    channels: int
    out: int
    added: bool
    normed: bool
    both: bool
    config: ConvConfig

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Parts of the output channels, of a segment's rows and of the columns."""
        config = self.config
        return self.out // config.out, -(-self.segment // config.rows), -(-self.width // config.columns)

    @property
    def count(self) -> int:
        """All items."""
        parts, rows, columns = self.tiles
        return self.frames * parts * rows * columns

    @property
    def steps(self) -> int:
        """Loads of a patch: steps in time, and slabs of channels."""
        return self.times * self.channels // SLAB

    def place(self, item: Index) -> tuple[Index, Index, Index, Index]:
        """Frame, row, column and output channel that an item begins at."""
        parts, rows, columns = self.tiles
        part, item = lax.rem(item, parts), lax.div(item, parts)
        row, item = lax.rem(item, rows), lax.div(item, rows)
        column, frame = lax.rem(item, columns), lax.div(item, columns)
        return frame, row * self.config.rows, column * self.config.columns, part * self.config.out


def _role(items: _Items, dtype: DTypeLike) -> Role:
    config = items.config
    rows, columns, groups = config.rows + 2, config.columns + 2, config.groups
    staged, kernels = (groups, config.units, config.slabs), (config.kernels, STEPS, config.out, SLAB)

    frames = jax.ShapeDtypeStruct((items.frames, SEGMENTS, items.segment, items.width, items.out), dtype)

    return Role(
        specialised(lambda given: _Block(items, given), groups),
        name="causal_convolution",
        outputs=(frames,) * (1 + items.both),
        scratch=dict(
            patch=two_views(
                (config.patches, rows * columns * 8, SLAB), (config.patches, rows, columns, 8, SLAB), dtype
            ),
            kernel=two_views(kernels, kernels, dtype),
            stage=two_views((*staged, ROWS, SLAB), (*staged, 8, 8, SLAB), dtype),
            vectors=plgpu.SMEM((1 + items.normed, items.out // SLAB, SLAB), jnp.float32),
            patch_full=plgpu.Barrier(num_arrivals=rows, num_barriers=config.patches),
            patch_free=plgpu.Barrier(num_arrivals=groups, num_barriers=config.patches),
            kernel_full=plgpu.Barrier(num_barriers=config.kernels),
            kernel_free=plgpu.Barrier(num_arrivals=groups, num_barriers=config.kernels),
            added_full=plgpu.Barrier(num_arrivals=config.units * config.slabs, num_barriers=groups),
            vectors_full=plgpu.Barrier(),
        ),
        groups=groups,
        blocks=min(config.blocks, items.count),
    )


def two_views(multiplied: Sequence[int], copied: Sequence[int], dtype: DTypeLike) -> Any:
    """Scratch of rows of a slab: as the tensor cores see it, and the same bytes as the copy engine does.

    See `shared.tile_scratch`; here the copy engine's view has the rows in several axes.
    """
    swizzle = plgpu.SwizzleTransform(2 * SLAB)  # pyright: ignore[reportAbstractUsage]
    tiled = plgpu.TilingTransform((8, SLAB))  # pyright: ignore[reportAbstractUsage]
    return plgpu.RefUnion(
        plgpu.SMEM(tuple(multiplied), dtype, transforms=(tiled, swizzle)),
        plgpu.SMEM(tuple(copied), dtype, transforms=(swizzle,)),
    )


def views(scratch: Ref) -> Refs:
    """The references of a `two_views`: to multiply, load and store; to copy from and to."""
    return tuple(scratch)


def load_row(frames: Ref, place: tuple[Any, ...], target: Ref, barrier: Ref) -> None:
    """Starts the copy of a row of a patch, of all segments; what is beyond the frame is zeros."""
    plgpu.copy_gmem_to_smem(frames.at[place], target, barrier)


class _Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, one item each."""

    def __init__(self, items: _Items, given: Given) -> None:
        super().__init__(given)
        scratch = given.scratch
        self.items, self.config = items, items.config
        self.past, self.x, self.kernel, self.vectors, *self.added = given.inputs
        self.outputs = given.outputs
        self.patch_mma, self.patch_in = views(scratch.patch)
        self.kernel_mma, self.kernel_in = views(scratch.kernel)
        self.stage_mma, self.stage_in = views(scratch.stage)
        self.vectors_in, self.vectors_full = scratch.vectors, scratch.vectors_full
        self.patch_full, self.patch_free = scratch.patch_full, scratch.patch_free
        self.kernel_full, self.kernel_free = scratch.kernel_full, scratch.kernel_free
        self.added_full = scratch.added_full
        self.turns = self.share(items.count)

    def place(self, turn: Index) -> tuple[Index, Index, Index, Index]:
        """As `_Items.place`, of a turn."""
        return self.items.place(self.number(turn))

    def slot(self, step: Index, third: int) -> Index:
        """Where a third of a kernel's step lies."""
        return third if self.config.kernels == STEPS else lax.rem(STEPS * step + third, self.config.kernels)

    # Computing warpgroups

    def compute(self) -> None:
        """What a computing warpgroup does."""
        config, steps = self.config, self.items.steps
        plgpu.set_max_registers(config.registers[0], action="increase")
        for s in range(config.patches):
            plgpu.barrier_arrive(self.patch_free.at[s])
        for s in range(config.kernels):
            plgpu.barrier_arrive(self.kernel_free.at[s])
        plgpu.barrier_wait(self.vectors_full)

        def item(turn, _):
            place = self.place(turn)
            if self.added:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self.load_added(place)
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, config.out), jnp.float32), plgpu.Layout.WGMMA)
            sums = lax.fori_loop(0, steps, lambda i, s: self.step(turn * steps + i, s), (zeros,) * config.units)
            self.finish(sums, place)
            return ()

        lax.fori_loop(0, self.turns, item, ())
        plgpu.wait_smem_to_gmem(0)

    def step(self, step: Index, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds a step in time and a slab of channels to the sums, [64 pixels, out] each."""
        config = self.config
        patch = lax.rem(step, config.patches)
        plgpu.barrier_wait(self.patch_full.at[patch])
        for third in range(STEPS):
            slot = self.slot(step, third)
            plgpu.barrier_wait(self.kernel_full.at[slot])

            def products(sums, third=third, slot=slot):
                for column in range(STEPS):
                    for unit, total in enumerate(sums):
                        row, first = config.box(self.group * config.units + unit)
                        start = jnp.int32(((row + third) * (config.columns + 2) + first + column) * 8)
                        pixels = self.patch_mma.at[patch, pl.ds(pl.multiple_of(start, 8), ROWS)]
                        plgpu.wgmma(total, pixels, self.kernel_mma.at[slot, column].transpose((1, 0)))

            sums = tuple(accumulate(products, list(sums)))
            plgpu.barrier_arrive(self.kernel_free.at[slot])
        plgpu.barrier_arrive(self.patch_free.at[patch])
        return sums

    def pieces(self) -> list[tuple[int, int]]:
        """Operands and slabs of output channels of a warpgroup."""
        return [(unit, slab) for unit in range(self.config.units) for slab in range(self.config.slabs)]

    def box(self, ref: Ref, place: tuple[Index, ...], unit: int, slab: int) -> Ref:
        """Of frames in memory, the place of a piece; a row beyond the segment is its last one."""
        frame, row, column, channel = place
        r, c = self.config.box(self.group * self.config.units + unit)
        row = jnp.minimum(row + r, self.items.segment - 1)
        return ref.at[frame, :, row, pl.ds(column + c, 8), pl.ds(channel + slab * SLAB, SLAB)]

    def load_added(self, place: tuple[Index, ...]) -> None:
        """Starts the copies of what is added."""
        full = self.added_full.at[self.group]
        for ref in self.added:
            for unit, slab in self.pieces():
                target = self.stage_in.at[self.group, unit, slab].transpose((1, 0, 2))
                plgpu.copy_gmem_to_smem(self.box(ref, place, unit, slab), target, full)

    def finish(self, sums: tuple[Array, ...], place: tuple[Index, ...]) -> None:
        """Bias, what is added, norm and SiLU; rounds, and sends what is wanted of it."""
        if self.added:
            plgpu.barrier_wait(self.added_full.at[self.group])
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        slabs = [self.slabs(unit, total, place) for unit, total in enumerate(sums)]
        outputs = list(self.outputs)
        if not self.items.normed or self.items.both:
            self.send(outputs.pop(0), slabs, place)
        if self.items.normed:
            if self.items.both:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.send(outputs.pop(0), [self.normalised(parts) for parts in slabs], place)

    def slabs(self, unit: int, total: Array, place: tuple[Index, ...]) -> list[Array]:
        """Sums with bias and what is added, [64 pixels, slab] each, rounded."""
        parts = []
        for slab in range(self.config.slabs):
            part = total[:, slab * SLAB : (slab + 1) * SLAB]
            part = part + self.vector(0, lax.div(place[3], SLAB) + slab, part.shape)
            if self.added:
                source = self.stage_mma.at[self.group, unit, slab]
                more = plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False)
                part = part + more.astype(jnp.float32)
            parts.append(part.astype(self.x.dtype))
        return parts

    def vector(self, number: int, slab: Index, shape: tuple[int, ...]) -> Array:
        """A slab of the bias or of the norm's weights, of each row."""
        vector = plgpu.load(self.vectors_in.at[number, slab], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return lax.broadcast_in_dim(vector, shape, [1])

    def normalised(self, parts: list[Array]) -> list[Array]:
        """Norm over channels and SiLU, of what would have been stored; rounded where it would be."""
        values = [part.astype(jnp.float32) for part in parts]
        total = sum((value * value).sum(axis=1) for value in values)
        scale = lax.broadcast_in_dim(lax.rsqrt(jnp.maximum(total, 1e-24)), values[0].shape, [0])
        normed = []
        for slab, value in enumerate(values):
            value = value * scale * self.vector(1, slab, value.shape)
            value = value.astype(self.x.dtype).astype(jnp.float32)
            normed.append((value / (1.0 + jnp.exp(-value))).astype(self.x.dtype))
        return normed

    def send(self, output: Ref, slabs: list[list[Array]], place: tuple[Index, ...]) -> None:
        """Starts the copies of all operands."""
        for unit, slab in self.pieces():
            self.stage_mma[self.group, unit, slab] = slabs[unit][slab]
        plgpu.commit_smem()
        for unit in range(self.config.units):
            row, _ = self.config.box(self.group * self.config.units + unit)

            def copy(unit=unit):
                for slab in range(self.config.slabs):
                    source = self.stage_in.at[self.group, unit, slab].transpose((1, 0, 2))
                    plgpu.copy_smem_to_gmem(source, self.box(output, place, unit, slab))

            pl.when(place[1] + row < self.items.segment)(copy)

    # The loading warpgroup

    def load(self) -> None:
        """What the loading warpgroup does: patches and kernels in the order of the steps."""
        config, items = self.config, self.items
        plgpu.set_max_registers(config.registers[1], action="decrease")
        plgpu.copy_gmem_to_smem(self.vectors, self.vectors_in, self.vectors_full)
        slabs = items.channels // SLAB

        def item(turn, _):
            place = self.place(turn)

            def step(i, _):
                step = turn * items.steps + i
                self.load_patch(step, place, lax.div(i, slabs), lax.rem(i, slabs) * SLAB)
                for third in range(STEPS):
                    slot = self.slot(step, third)
                    plgpu.barrier_wait(self.kernel_free.at[slot])
                    box = self.kernel.at[i, third, :, pl.ds(place[3], config.out)]
                    plgpu.copy_gmem_to_smem(box, self.kernel_in.at[slot], self.kernel_full.at[slot])
                return ()

            lax.fori_loop(0, items.steps, step, ())
            return ()

        lax.fori_loop(0, self.turns, item, ())
        for s in range(config.patches):
            plgpu.barrier_wait(self.patch_free.at[s])
        for s in range(config.kernels):
            plgpu.barrier_wait(self.kernel_free.at[s])

    def load_patch(self, step: Index, place: tuple[Index, ...], time: Index, channel: Index) -> None:
        """Starts the copies of a patch and its rim, row by row; above a segment's first row is the last of another."""
        frame, first, column, _ = place
        config, segment, frame = self.config, self.items.segment, frame + time - (self.items.times - 1)
        patch = lax.rem(step, config.patches)
        full = self.patch_full.at[patch]
        plgpu.barrier_wait(self.patch_free.at[patch])
        across = pl.ds(column - 1, config.columns + 2), pl.ds(channel, SLAB)
        for r in range(config.rows + 2):
            row = first + r - 1
            other = jnp.where(row < 0, -1, jnp.where(row >= segment, 1, 0))
            box = pl.ds(other, SEGMENTS), row - other * segment, *across
            target = self.patch_in.at[patch, r].transpose((1, 0, 2))

            def copy(ref: Ref, at: Index, box=box, target=target) -> Callable[[], None]:
                return lambda: load_row(ref, (at, *box), target, full)

            if self.items.times == 1:
                copy(self.x, frame)()
                continue
            pl.when(frame < 0)(copy(self.past, frame + STEPS - 1))
            pl.when(frame >= 0)(copy(self.x, frame))
