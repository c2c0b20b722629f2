"""Density of the attention maps of a whole network."""

from collections.abc import Sequence
from typing import NamedTuple

from monarchrt.models.attention.base import Attention, Density, Grid, mean_density


class NetworkDensity(NamedTuple):
    """The density of a network's attention maps, averaged over its layers, by four definitions in use.

    Examples:
        >>> print(NetworkDensity(asked=0.15, kept=0.19, visible=0.19, with_warm_up=0.4))
        19.0% of the map (asked for: 15.0%), 40.0% with the warm-up

    Attributes:
        asked: As in `Density`, without the warm-up, that is, the first layers, steps or blocks of another kind.
        kept: As in `Density`, without the warm-up.
        visible: As in `Density`, without the warm-up.
        with_warm_up: Kept fraction of the entries that are not masked, including the warm-up; warm-up steps count only
            if the total number of steps is known.
    """

    asked: float
    kept: float
    visible: float
    with_warm_up: float

    def __str__(self) -> str:
        text = str(Density(*self[:3]))
        if abs(self.with_warm_up - self.visible) > 5e-4:
            text += f", {self.with_warm_up:.1%} with the warm-up"
        return text


FULL = NetworkDensity(1.0, 1.0, 1.0, 1.0)


def density_of_network(
    attention: Attention | Sequence[Attention],
    num_layers: int,
    grid: Grid,
    *,
    causal_block: int | None = None,
    steps: int | None = None,
) -> NetworkDensity:
    """The density averaged over the layers of a network.

    Examples:
        >>> from monarchrt.models.attention.notation import parse
        >>> warmed = parse("first_layers(1, dense, monarch)")
        >>> print(density_of_network(warmed, 4, (2, 4, 4)))
        50.0% of the map, 62.5% with the warm-up

    Args:
        attention: One setting, or one per layer.
        num_layers: Number of layers.
        grid: Tokens (F, h, w).
        causal_block: As in `Attention.density`.
        steps: As in `Attention.density`.

    Returns:
        The density without the warm-up, and with it.
    """
    settings = [attention] * num_layers if isinstance(attention, Attention) else list(attention)
    after = [setting.after_warm_up() for setting in settings]

    def mean(settings: Sequence[Attention]) -> Density:
        layers = (setting.for_layer(layer) for layer, setting in enumerate(settings))
        return mean_density((1, layer.density(grid, causal_block=causal_block, steps=steps)) for layer in layers)

    return NetworkDensity(*mean(after), mean(settings).visible)
