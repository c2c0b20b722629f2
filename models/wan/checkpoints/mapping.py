"""Names of Wan's parameters in our model, official checkpoints and diffusers, as data, with their changes of layout."""

import dataclasses
import functools
from typing import Literal

from flax import nnx

from monarchrt.models.checkpoints import reading
from monarchrt.models.checkpoints.reading import AnyArray, Layout, to_ours
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel
from monarchrt.models.wan.kinds import own_shapes

type Arrays = tuple[tuple[str, str, Layout], ...]
type Naming = Literal["official", "diffusers"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One module or array: its path in our model and its name in the two formats; `{i}` is the layer.

    Attributes:
        ours: Path in our model, joined by dots.
        official: Name in Wan's own files.
        diffusers: Name in diffusers' files.
        arrays: For each array, its name in our module and in theirs ("" if the rule names the array itself), and the
            change of layout.
    """

    ours: str
    official: str
    diffusers: str
    arrays: Arrays


LINEAR: Arrays = (("kernel", "weight", "linear"), ("bias", "bias", "vector"))
CONV: Arrays = (("kernel", "weight", "conv"), ("bias", "bias", "vector"))
AFFINE: Arrays = (("scale", "weight", "vector"), ("bias", "bias", "vector"))
SCALE: Arrays = (("scale", "weight", "vector"),)
ARRAY: Arrays = (("", "", "vector"),)

P, D = "blocks.{i}", "condition_embedder"
OUTER = (
    Rule("patch_embedding", "patch_embedding", "patch_embedding", CONV),
    Rule("text_embedding.fc1", "text_embedding.0", f"{D}.text_embedder.linear_1", LINEAR),
    Rule("text_embedding.fc2", "text_embedding.2", f"{D}.text_embedder.linear_2", LINEAR),
    Rule("time_embedding.fc1", "time_embedding.0", f"{D}.time_embedder.linear_1", LINEAR),
    Rule("time_embedding.fc2", "time_embedding.2", f"{D}.time_embedder.linear_2", LINEAR),
    Rule("time_projection", "time_projection.1", f"{D}.time_proj", LINEAR),
    Rule("head.modulation", "head.modulation", "scale_shift_table", ARRAY),
    Rule("head.proj", "head.head", "proj_out", LINEAR),
)
OUTER_I2V = (
    Rule("image_embedding.norm1", "img_emb.proj.0", f"{D}.image_embedder.norm1", AFFINE),
    Rule("image_embedding.mlp.fc1", "img_emb.proj.1", f"{D}.image_embedder.ff.net.0.proj", LINEAR),
    Rule("image_embedding.mlp.fc2", "img_emb.proj.3", f"{D}.image_embedder.ff.net.2", LINEAR),
    Rule("image_embedding.norm2", "img_emb.proj.4", f"{D}.image_embedder.norm2", AFFINE),
)
# the official norm3, of the cross-attention, is diffusers' norm2; other norms of a block have no parameters
BLOCK = (
    Rule("blocks.modulation", f"{P}.modulation", f"{P}.scale_shift_table", ARRAY),
    *(Rule(f"blocks.self_attn.{x}", f"{P}.self_attn.{x}", f"{P}.attn1.to_{x}", LINEAR) for x in "qkv"),
    Rule("blocks.self_attn.o", f"{P}.self_attn.o", f"{P}.attn1.to_out.0", LINEAR),
    *(Rule(f"blocks.self_attn.norm_{x}", f"{P}.self_attn.norm_{x}", f"{P}.attn1.norm_{x}", SCALE) for x in "qk"),
    Rule("blocks.norm3", f"{P}.norm3", f"{P}.norm2", AFFINE),
    *(Rule(f"blocks.cross_attn.{x}", f"{P}.cross_attn.{x}", f"{P}.attn2.to_{x}", LINEAR) for x in "qkv"),
    Rule("blocks.cross_attn.o", f"{P}.cross_attn.o", f"{P}.attn2.to_out.0", LINEAR),
    *(Rule(f"blocks.cross_attn.norm_{x}", f"{P}.cross_attn.norm_{x}", f"{P}.attn2.norm_{x}", SCALE) for x in "qk"),
    Rule("blocks.ffn.fc1", f"{P}.ffn.0", f"{P}.ffn.net.0.proj", LINEAR),
    Rule("blocks.ffn.fc2", f"{P}.ffn.2", f"{P}.ffn.net.2", LINEAR),
)
BLOCK_I2V = (
    Rule("blocks.cross_attn.k_img", f"{P}.cross_attn.k_img", f"{P}.attn2.add_k_proj", LINEAR),
    Rule("blocks.cross_attn.v_img", f"{P}.cross_attn.v_img", f"{P}.attn2.add_v_proj", LINEAR),
    Rule("blocks.cross_attn.norm_k_img", f"{P}.cross_attn.norm_k_img", f"{P}.attn2.norm_added_k", SCALE),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and its destination.

    Attributes:
        path: Path of our parameter.
        layer: Index on the parameter's leading layer axis, or None outside the blocks.
        official: Name in Wan's own files.
        diffusers: Name in diffusers' files.
        layout: Change of layout; see `to_ours`.
    """

    path: tuple[str, ...]
    layer: int | None
    official: str
    diffusers: str
    layout: Layout

    def name(self, naming: Naming) -> str:
        """The tensor's name in a format."""
        return self.official if naming == "official" else self.diffusers


def tensors(config: WanConfig) -> list[Tensor]:
    """Every tensor of a checkpoint of `config`, in the order of the official files' modules.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> len(tensors(wan_config("wan2.1-t2v-1.3b"))), len(tensors(wan_config("wan2.1-i2v-14b")))
        (825, 1303)

    Args:
        config: Configuration, of which model type, number of layers and attention are used.

    Returns:
        One entry per tensor.
    """
    i2v = config.model_type == "i2v"
    outer = [_tensor(rule, leaf, None) for rule in OUTER + OUTER_I2V * i2v for leaf in rule.arrays]
    blocks = [
        _tensor(rule, leaf, layer)
        for layer in range(config.num_layers)
        for rule in BLOCK + BLOCK_I2V * i2v
        for leaf in rule.arrays
    ]
    return outer + blocks + own_tensors(config)


def own_tensors(config: WanConfig) -> list[Tensor]:
    """Tensors of attention kinds, which are named by their path and stored in our layout."""
    return [
        Tensor(path, layer, f"blocks.{layer}.self_attn.{name}", f"blocks.{layer}.attn1.{name}", "vector")
        for layer in range(config.num_layers)
        for path in own_shapes(config)
        for name in (".".join(path[2:]),)
    ]


def to_theirs(array: AnyArray, layout: Layout) -> AnyArray:
    """The inverse of `to_ours`."""
    return array.transpose(4, 3, 0, 1, 2) if layout == "conv" else to_ours(array, layout)


def checkpoint_shape(config: WanConfig, tensor: Tensor) -> tuple[int, ...]:
    """Shape of a tensor in a checkpoint of `config`.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> config = wan_config("wan2.1-t2v-1.3b")
        >>> checkpoint_shape(config, tensors(config)[0])
        (1536, 16, 1, 2, 2)
    """
    return reading.stored_shape(parameter_shapes(config), tensor)


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: WanConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of our parameters by path, stacked over layers; allocates nothing."""
    return reading.parameter_shapes(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))


def _tensor(rule: Rule, leaf: tuple[str, str, Layout], layer: int | None) -> Tensor:
    ours, theirs, layout = leaf
    path = (*rule.ours.split("."), ours) if ours else tuple(rule.ours.split("."))
    official, diffusers = (
        ".".join(filter(None, (name.replace("{i}", str(layer)), theirs))) for name in (rule.official, rule.diffusers)
    )
    return Tensor(path, layer, official, diffusers, layout)
