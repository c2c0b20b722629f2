"""The names of the tensors in the two formats, written out: the table that reads and writes them is not asked."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import load_checkpoint, mapping, save_checkpoint

# our parameter; the official name; diffusers' name. {i} is the layer, whose parameters we stack.
LITERAL = """
patch_embedding.kernel              patch_embedding.weight            patch_embedding.weight
patch_embedding.bias                patch_embedding.bias              patch_embedding.bias
text_embedding.fc1.kernel           text_embedding.0.weight           condition_embedder.text_embedder.linear_1.weight
text_embedding.fc1.bias             text_embedding.0.bias             condition_embedder.text_embedder.linear_1.bias
text_embedding.fc2.kernel           text_embedding.2.weight           condition_embedder.text_embedder.linear_2.weight
text_embedding.fc2.bias             text_embedding.2.bias             condition_embedder.text_embedder.linear_2.bias
time_embedding.fc1.kernel           time_embedding.0.weight           condition_embedder.time_embedder.linear_1.weight
time_embedding.fc1.bias             time_embedding.0.bias             condition_embedder.time_embedder.linear_1.bias
time_embedding.fc2.kernel           time_embedding.2.weight           condition_embedder.time_embedder.linear_2.weight
time_embedding.fc2.bias             time_embedding.2.bias             condition_embedder.time_embedder.linear_2.bias
time_projection.kernel              time_projection.1.weight          condition_embedder.time_proj.weight
time_projection.bias                time_projection.1.bias            condition_embedder.time_proj.bias
image_embedding.norm1.scale         img_emb.proj.0.weight    condition_embedder.image_embedder.norm1.weight
image_embedding.norm1.bias          img_emb.proj.0.bias      condition_embedder.image_embedder.norm1.bias
image_embedding.mlp.fc1.kernel      img_emb.proj.1.weight    condition_embedder.image_embedder.ff.net.0.proj.weight
image_embedding.mlp.fc1.bias        img_emb.proj.1.bias      condition_embedder.image_embedder.ff.net.0.proj.bias
image_embedding.mlp.fc2.kernel      img_emb.proj.3.weight    condition_embedder.image_embedder.ff.net.2.weight
image_embedding.mlp.fc2.bias        img_emb.proj.3.bias      condition_embedder.image_embedder.ff.net.2.bias
image_embedding.norm2.scale         img_emb.proj.4.weight    condition_embedder.image_embedder.norm2.weight
image_embedding.norm2.bias          img_emb.proj.4.bias      condition_embedder.image_embedder.norm2.bias
head.modulation                     head.modulation                   scale_shift_table
head.proj.kernel                    head.head.weight                  proj_out.weight
head.proj.bias                      head.head.bias                    proj_out.bias
blocks.modulation                   blocks.{i}.modulation             blocks.{i}.scale_shift_table
blocks.self_attn.q.kernel           blocks.{i}.self_attn.q.weight     blocks.{i}.attn1.to_q.weight
blocks.self_attn.q.bias             blocks.{i}.self_attn.q.bias       blocks.{i}.attn1.to_q.bias
blocks.self_attn.k.kernel           blocks.{i}.self_attn.k.weight     blocks.{i}.attn1.to_k.weight
blocks.self_attn.k.bias             blocks.{i}.self_attn.k.bias       blocks.{i}.attn1.to_k.bias
blocks.self_attn.v.kernel           blocks.{i}.self_attn.v.weight     blocks.{i}.attn1.to_v.weight
blocks.self_attn.v.bias             blocks.{i}.self_attn.v.bias       blocks.{i}.attn1.to_v.bias
blocks.self_attn.o.kernel           blocks.{i}.self_attn.o.weight     blocks.{i}.attn1.to_out.0.weight
blocks.self_attn.o.bias             blocks.{i}.self_attn.o.bias       blocks.{i}.attn1.to_out.0.bias
blocks.self_attn.norm_q.scale       blocks.{i}.self_attn.norm_q.weight    blocks.{i}.attn1.norm_q.weight
blocks.self_attn.norm_k.scale       blocks.{i}.self_attn.norm_k.weight    blocks.{i}.attn1.norm_k.weight
blocks.norm3.scale                  blocks.{i}.norm3.weight           blocks.{i}.norm2.weight
blocks.norm3.bias                   blocks.{i}.norm3.bias             blocks.{i}.norm2.bias
blocks.cross_attn.q.kernel          blocks.{i}.cross_attn.q.weight    blocks.{i}.attn2.to_q.weight
blocks.cross_attn.q.bias            blocks.{i}.cross_attn.q.bias      blocks.{i}.attn2.to_q.bias
blocks.cross_attn.k.kernel          blocks.{i}.cross_attn.k.weight    blocks.{i}.attn2.to_k.weight
blocks.cross_attn.k.bias            blocks.{i}.cross_attn.k.bias      blocks.{i}.attn2.to_k.bias
blocks.cross_attn.v.kernel          blocks.{i}.cross_attn.v.weight    blocks.{i}.attn2.to_v.weight
blocks.cross_attn.v.bias            blocks.{i}.cross_attn.v.bias      blocks.{i}.attn2.to_v.bias
blocks.cross_attn.o.kernel          blocks.{i}.cross_attn.o.weight    blocks.{i}.attn2.to_out.0.weight
blocks.cross_attn.o.bias            blocks.{i}.cross_attn.o.bias      blocks.{i}.attn2.to_out.0.bias
blocks.cross_attn.norm_q.scale      blocks.{i}.cross_attn.norm_q.weight   blocks.{i}.attn2.norm_q.weight
blocks.cross_attn.norm_k.scale      blocks.{i}.cross_attn.norm_k.weight   blocks.{i}.attn2.norm_k.weight
blocks.cross_attn.k_img.kernel      blocks.{i}.cross_attn.k_img.weight    blocks.{i}.attn2.add_k_proj.weight
blocks.cross_attn.k_img.bias        blocks.{i}.cross_attn.k_img.bias      blocks.{i}.attn2.add_k_proj.bias
blocks.cross_attn.v_img.kernel      blocks.{i}.cross_attn.v_img.weight    blocks.{i}.attn2.add_v_proj.weight
blocks.cross_attn.v_img.bias        blocks.{i}.cross_attn.v_img.bias      blocks.{i}.attn2.add_v_proj.bias
blocks.cross_attn.norm_k_img.scale  blocks.{i}.cross_attn.norm_k_img.weight  blocks.{i}.attn2.norm_added_k.weight
blocks.ffn.fc1.kernel               blocks.{i}.ffn.0.weight           blocks.{i}.ffn.net.0.proj.weight
blocks.ffn.fc1.bias                 blocks.{i}.ffn.0.bias             blocks.{i}.ffn.net.0.proj.bias
blocks.ffn.fc2.kernel               blocks.{i}.ffn.2.weight           blocks.{i}.ffn.net.2.weight
blocks.ffn.fc2.bias                 blocks.{i}.ffn.2.bias             blocks.{i}.ffn.net.2.bias
"""
ROWS = [line.split() for line in LITERAL.strip().splitlines()]
WEIGHTS = "diffusion_pytorch_model.safetensors"
# square where it can be, so that no shape gives a swap away
CONFIG = wan_config("tiny", dim=24, num_heads=2, ffn_dim=24, freq_dim=24, text_dim=24, num_layers=2, model_type="i2v",
                    in_channels=36, image_dim=1280)  # fmt: skip


def theirs(value):
    """A parameter of ours as torch has it, by the number of its axes."""
    if value.ndim == 5:
        return value.transpose(4, 3, 0, 1, 2)
    return value.T if value.ndim == 2 else value


def values(model):
    """Every parameter by its literal name, one per layer."""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def model():
    """Every number differs from every other."""
    model = WanModel(CONFIG, rngs=nnx.Rngs(0))
    start = 0
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf[...] = np.arange(start, start + leaf.size, dtype=np.float32).reshape(leaf.shape)
        start += leaf.size
    return model


def expected(model, column):
    """What a file of the format holds, by the list."""
    ours, tensors = values(model), {}
    for row in ROWS:
        value = ours[row[0]]
        if row[0].startswith("blocks."):
            for layer in range(CONFIG.num_layers):
                tensors[row[column].format(i=layer)] = (
                    theirs(value[layer]) if "modulation" not in row[0] else value[layer]
                )
        else:
            tensors[row[column]] = theirs(value) if "modulation" not in row[0] else value
    return tensors


def test_the_list_is_of_the_whole_model(model):
    assert {row[0] for row in ROWS} == values(model).keys()
    assert len(expected(model, 1)) == len(expected(model, 2)) == len(mapping.tensors(CONFIG))


@pytest.mark.parametrize(("format", "column"), [("official", 1), ("diffusers", 2)])
def test_what_is_written_and_read(model, tmp_path, format, column):
    wanted = expected(model, column)
    save_checkpoint(model, tmp_path / "made", format=format)
    found = safetensors.numpy.load_file(tmp_path / "made" / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # and a file that was written without our help
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in wanted.items()}, tmp_path / "made" / WEIGHTS
    )
    again = values(load_checkpoint(tmp_path / "made"))
    for name, value in values(model).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("image_embedding.norm1", "image_embedding.norm2"),
        ("image_embedding.mlp.fc1", "image_embedding.mlp.fc2"),
        ("blocks.cross_attn.norm_q", "blocks.cross_attn.norm_k"),
        ("blocks.cross_attn.norm_k", "blocks.cross_attn.norm_k_img"),
        ("blocks.cross_attn.k_img", "blocks.cross_attn.v_img"),
        ("blocks.self_attn.norm_q", "blocks.cross_attn.norm_q"),
    ],
)
@pytest.mark.parametrize("format", ["official", "diffusers"])
def test_a_swap_in_the_table_is_noticed(model, tmp_path, monkeypatch, one, other, format):
    """The check above fails where two rows have each other's names."""
    tables = {part: getattr(mapping, part) for part in ("OUTER", "OUTER_I2V", "BLOCK", "BLOCK_I2V")}
    names = {rule.ours: getattr(rule, format) for table in tables.values() for rule in table}
    names[one], names[other] = names[other], names[one]
    for part, table in tables.items():
        renamed = tuple(dataclasses.replace(rule, **{format: names[rule.ours]}) for rule in table)
        monkeypatch.setattr(mapping, part, renamed)
    with pytest.raises((AssertionError, ValueError)):
        test_what_is_written_and_read(model, tmp_path, format, 1 if format == "official" else 2)
