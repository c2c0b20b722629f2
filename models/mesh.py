"""The shape of a mesh of devices in the notation of the options, `data=2,fsdp=4,heads=2`. Does not import JAX."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from monarchrt.models.errors import UserError

AXES = ("data", "fsdp", "heads")
_MEANING = "data (parts of the batch), fsdp (parts of the batch and of the weights) and heads (parts of each clip)"


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """The number of devices along each axis of a mesh.

    Attributes:
        data: Splits the batch; weights are replicated.
        fsdp: Splits the batch, and the weights and the training state.
        heads: Splits each clip: its tokens outside of attention, its heads inside.

    Examples:
        >>> shape = MeshShape.parse("data=2,heads=3")
        >>> print(shape, shape.size)
        data=2,heads=3 6
    """

    data: int = 1
    fsdp: int = 1
    heads: int = 1

    @classmethod
    def parse(cls, text: str, *, devices: int | None = None) -> "MeshShape":
        """Reads the notation.

        Args:
            text: Axes with their sizes; missing axes are 1, and one may be -1 for all remaining devices.
            devices: Number of devices; None if it is not known yet, and -1 then counts as 1.

        Returns:
            The shape.

        Raises:
            UserError: If the text is invalid, or the shape does not have `devices` devices.

        Examples:
            >>> MeshShape.parse("heads=2,fsdp=-1", devices=8).fsdp
            4
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals or not re.fullmatch(r"-1|0*[1-9][0-9]{0,5}", value):
                raise UserError(f"mesh is {text!r}; it must be axes with their devices, for example data=2,fsdp=4")
            if name not in AXES:
                raise UserError(f"mesh is {text!r}, which has an axis {name!r}; there are {_MEANING}")
            if name in sizes:
                raise UserError(f"mesh is {text!r}, which has {name} twice; give it once")
            sizes[name] = int(value)
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"mesh is {text!r}; only one axis may be -1, the devices that are left")
        taken = math.prod(size for size in sizes.values() if size != -1)
        if free:
            sizes[free[0]] = 1 if devices is None or devices % taken else devices // taken
        shape = cls(**sizes)
        if devices is not None and shape.size != devices:
            raise UserError(
                f"mesh is {text}, which takes {'a multiple of ' * bool(free)}{_devices(taken)}, and there "
                f"{'is' if devices == 1 else 'are'} {devices}; it could be {_choices(shape, devices)}"
            )
        return shape

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.heads

    @property
    def batch_parts(self) -> int:
        """Number of parts that a batch is split into."""
        return self.data * self.fsdp

    def sizes(self) -> tuple[int, int, int]:
        """Sizes in the order of `AXES`."""
        return self.data, self.fsdp, self.heads

    def __str__(self) -> str:
        sizes = zip(AXES, self.sizes(), strict=True)
        return ",".join(f"{name}={size}" for name, size in sizes if size > 1) or "data=1"

    def check_batch(self, batch: int, *, accumulation: int = 1) -> None:
        """Raises UserError unless the batch divides evenly into parts of the accumulation and of the mesh."""
        parts = self.batch_parts * accumulation
        if batch % parts:
            among = f"mesh {self}" if self.heads > 1 else _devices(self.size)
            times = f" times accumulation {accumulation}" if accumulation > 1 else ""
            verb = "does" if self.heads > 1 or (self.size == 1 and not times) else "do"
            raise UserError(f"batch is {batch}, which {among}{times} {verb} not divide; use a multiple of {parts}")

    def check_heads(self, heads: int, *, whose: str = "the network") -> None:
        """Raises UserError unless the axis heads divides a network's attention heads."""
        if heads % self.heads:
            could = " or ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise UserError(
                f"mesh is {self}, but {whose} has {heads} attention heads, which heads={self.heads} does not divide; "
                f"heads could be {could}"
            )

    def check_one_clip(self) -> None:
        """Raises UserError if the axis data, which splits batches, is used to generate a single video."""
        if self.data > 1:
            raise UserError(
                f"mesh is {self}, but one video is made at a time, which data={self.data} cannot split; use heads, "
                f"such as heads={self.size}, or fsdp where weights are too large for one device"
            )


def mesh_shape(mesh: str | None, *, devices: int, sharding: str = "replicated") -> MeshShape:
    """The shape given by the option `--mesh` or its short form `--sharding`.

    Args:
        mesh: Text for `MeshShape.parse`; None to use `sharding`.
        devices: Number of devices.
        sharding: "replicated" for all devices along data, "fsdp" for all along fsdp.

    Returns:
        The shape.

    Raises:
        UserError: As in `MeshShape.parse`.

    Examples:
        >>> print(mesh_shape(None, devices=4, sharding="fsdp"))
        fsdp=4
    """
    if mesh is not None:
        return MeshShape.parse(mesh, devices=devices)
    return MeshShape(fsdp=devices) if sharding == "fsdp" else MeshShape(data=devices)


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count > 1)}"


def _choices(asked: MeshShape, devices: int) -> str:
    """Suggests meshes of this many devices, beginning with those along the requested axes."""
    if devices == 1:
        return "data=1"
    wanted: Sequence[str] = [name for name, size in zip(AXES, asked.sizes(), strict=True) if size > 1] or AXES
    choices = [f"{name}={devices}" for name in wanted]
    if len(wanted) > 1:
        first = next(n for n in range(2, devices + 1) if devices % n == 0)
        if first < devices:
            choices.append(f"{wanted[0]}={devices // first},{wanted[-1]}={first}")
    return ", ".join(choices[:-1]) + " or " * (len(choices) > 1) + choices[-1]
