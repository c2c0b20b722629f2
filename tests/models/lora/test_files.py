"""Files of LoRAs: what each changes, and what is refused by name."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from monarchrt.models.generate.loras import open_loras
from monarchrt.models.lora import merged, open_lora, with_loras
from monarchrt.models.lora.merging import AsTrained, Scaled, as_trained, merge_arrays, parse_scaled
from monarchrt.models.lora.writing import Factors, rewrite_lora, write_lora
from monarchrt.models.wan import wan_config
from monarchrt.models.wan.checkpoints import load_source, open_source, save_checkpoint
from monarchrt.models.wan.checkpoints.settings import OWN_KEY, Trained
from tests.parameters import flat
from tests.untyped import untyped

Q = "blocks.1.self_attn.q"


def opened(texts):
    return open_loras(texts, report=pytest.fail)


@pytest.fixture(scope="module")
def factors(loras, small):
    return loras.factors(small)


def product(factors, name, scale):
    down, up = factors[name]
    return np.float32(scale) * (up.astype(np.float64) @ down.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "comfyui-AB", "musubi"])
def test_change_of_each_tensor(loras, factors, small, tmp_path, format):
    file = loras.save(tmp_path / "a.safetensors", *loras.FORMATS[format](factors))
    lora = open_lora(file, warn=pytest.fail)
    assert lora.format == format.removesuffix("-AB")
    assert lora.changes.keys() == {f"{name}.weight" for name in factors}
    assert set(lora.ranks.values()) == {loras.RANK}
    assert set(lora.alphas.values()) == {loras.ALPHA}
    for name in factors:
        np.testing.assert_allclose(lora.delta(f"{name}.weight"), product(factors, name, 2 / 3), atol=1e-6)
    lora.check(small)


class TestAlpha:
    def test_missing_is_said_once(self, loras, factors, tmp_path):
        file = loras.save(tmp_path / "a.safetensors", *loras.as_comfyui(factors, alpha=None))
        said = []
        lora = open_lora(file, warn=said.append)
        assert len(said) == 1
        assert f"{file} has no alpha" in said[0]
        np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(factors, Q, 1.0), atol=1e-6)

    def test_of_each_layer(self, loras, factors, tmp_path):
        tensors, _ = loras.as_musubi(factors)
        tensors["lora_unet_blocks_1_self_attn_q.alpha"] = np.float16(6.0)
        lora = open_lora(loras.save(tmp_path / "a.safetensors", tensors))
        np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(factors, Q, 2.0), atol=1e-6)
        other = "blocks.0.self_attn.q"
        np.testing.assert_allclose(lora.delta(f"{other}.weight"), product(factors, other, 2 / 3), atol=1e-6)

    @pytest.mark.parametrize(
        ("more", "scale"),
        [({"alpha_pattern": {"blocks.1.attn1.to_q": 9}}, 3.0), ({"alpha_pattern": {"attn1.to_q": 9}}, 3.0),
         ({"alpha_pattern": {"^blocks.1.attn1.to_q": 9}}, 3.0), ({"alpha_pattern": {"^attn1.to_q": 9}}, 2 / 3),
         ({"alpha_pattern": {"attn2.to_q": 9}}, 2 / 3), ({"use_rslora": True}, 2 / 3**0.5),
         ({"alpha_pattern": {r"blocks\.[12]\.attn1\.to_[qk]": 9}}, 3.0), ({"alpha_pattern": {"to_k|to_q": 9}}, 3.0),
         ({"alpha_pattern": {"to": 7, "attn2.*": 5, "attn1.*": 9, ".*": 8}}, 3.0),
         ({"alpha_pattern": {"o_q": 9}}, 2 / 3), ({"lora_alpha": None, "alpha_pattern": {".*": 9}}, 3.0)],
    )  # fmt: skip
    def test_patterns_of_peft(self, loras, factors, tmp_path, more, scale):
        tensors, metadata = loras.as_diffusers(factors)
        data = json.loads(metadata["lora_adapter_metadata"]) | {f"transformer.{k}": v for k, v in more.items()}
        file = loras.save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(data)})
        np.testing.assert_allclose(open_lora(file).delta(f"{Q}.weight"), product(factors, Q, scale), atol=1e-6)

    @pytest.mark.parametrize(
        ("more", "message"),
        [({"alpha_pattern": {"attn1.(to_q": 9}}, r'alpha_pattern in its header has "attn1.\(to_q", which is not'),
         ({"rank_pattern": {"*": 9}}, r'rank_pattern in its header has "\*", which is not a valid regular '),
         ({"rank_pattern": ["to_q"]}, r'rank_pattern in its header is \["to_q"\], not names with a number each'),
         ({"rank_pattern": {"to_q": 2.5}}, "rank_pattern in its header has 2.5, not a whole number of at least 1"),
         ({"alpha_pattern": {"to_q": None}}, "alpha_pattern in its header has null, not a number"),
         ({"alpha_pattern": {"to_q": True}}, "alpha_pattern in its header has true, not a number"),
         ({"lora_alpha": "8"}, 'lora_alpha in its header has "8", not a number'),
         ({"r": 0}, "r in its header has 0, not a whole number of at least 1"),
         ({"use_rslora": "false"}, 'use_rslora in its header is "false", not true or false'),
         ({"use_dora": True}, r"holds DoRA \(use_dora in its header\), which is not supported"),
         ({"alora_invocation_tokens": [1]}, "holds aLoRA"),
         ({"init_lora_weights": "pissa_niter_4"}, "began as PiSSA .*make it a plain LoRA by PEFT's save_pretrained"),
         ({"init_lora_weights": "OLoRA"}, "began as OLoRA")],
    )  # fmt: skip
    def test_what_peft_may_not_say(self, loras, factors, tmp_path, more, message):
        tensors, metadata = loras.as_diffusers(factors)
        data = json.loads(metadata["lora_adapter_metadata"]) | {f"transformer.{k}": v for k, v in more.items()}
        file = loras.save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(data)})
        with pytest.raises(ValueError, match=message) as raised:
            open_lora(file)
        assert str(file) in str(raised.value)

    @pytest.mark.parametrize("beginning", [True, False, "gaussian", "eva"])
    def test_beginnings_that_leave_the_weights_alone(self, loras, factors, tmp_path, beginning):
        tensors, metadata = loras.as_diffusers(factors)
        data = json.loads(metadata["lora_adapter_metadata"]) | {"transformer.init_lora_weights": beginning}
        file = loras.save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(data)})
        np.testing.assert_allclose(open_lora(file).delta(f"{Q}.weight"), product(factors, Q, 2 / 3), atol=1e-6)

    @pytest.mark.parametrize(
        ("more", "lines"),
        [
            ({"r": 4, "rank_pattern": {".*": 3}}, 0),
            ({"rank_pattern": {r"blocks\.1\.attn1\.to_q": 4}}, 1),
            ({"r": 4}, 1),
        ],
    )
    def test_another_rank_than_that_of_the_matrices_is_said(self, loras, factors, tmp_path, more, lines):
        tensors, metadata = loras.as_diffusers({Q: factors[Q]})
        data = json.loads(metadata["lora_adapter_metadata"]) | {f"transformer.{k}": v for k, v in more.items()}
        file = loras.save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(data)})
        said = []
        lora = open_lora(file, warn=said.append)
        np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(factors, Q, 2 / 3), atol=1e-6)
        assert len(said) == lines
        assert all(f"the rank of {Q} is 4, but its matrices have 3, which is used" in line for line in said)

    def test_of_kohyas_header(self, loras, factors, tmp_path):
        """Where a file has no tensors of alpha; those of a layer count before it."""
        tensors = {k: x for k, x in loras.as_musubi(factors)[0].items() if not k.endswith("alpha")}
        header = {"ss_network_alpha": "6.0", "ss_network_dim": "3"}
        said = []
        lora = open_lora(loras.save(tmp_path / "a.safetensors", tensors, header), warn=said.append)
        assert (lora.said, set(lora.alphas.values())) == ("ss_network_alpha", {6.0})
        assert [line.partition("; ")[2] for line in said] == ["ss_network_alpha 6 from its header is used"]
        np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(factors, Q, 2.0), atol=1e-6)
        one = {f"lora_unet_{Q.replace('.', '_')}.alpha": np.float32(9.0)}
        mixed = open_lora(loras.save(tmp_path / "b.safetensors", tensors | one, header))
        assert (mixed.said, mixed.alphas[Q], mixed.alphas["blocks.0.self_attn.q"]) == ("tensors", 9.0, 6.0)

    @pytest.mark.parametrize(
        ("style", "header", "why"),
        [("as_musubi", {"ss_network_alpha": "None"}, "of 1$"), ("as_musubi", {"ss_network_alpha": "0"}, "of 1$"),
         ("as_musubi", {"ss_network_alpha": "6", "ss_network_dim": "4"},
          r"; ss_network_alpha 6 in its header is left out: it is for rank 4 \(ss_network_dim\), and there .* rank 3$"),
         ("as_comfyui", {"ss_network_alpha": "6", "ss_network_dim": "3"}, "left out: Musubi's converter to")],
    )  # fmt: skip
    def test_kohyas_header_that_does_not_count(self, loras, factors, tmp_path, style, header, why):
        """Musubi's converter has multiplied alpha in, and keeps the header."""
        tensors = {k: x for k, x in getattr(loras, style)(factors)[0].items() if not k.endswith("alpha")}
        said = []
        lora = open_lora(loras.save(tmp_path / "a.safetensors", tensors, header), warn=said.append)
        assert (lora.said, set(lora.alphas.values()), len(said)) == ("", {3.0}, 1)
        assert re.search(f"has no alpha; the rank is used.*{why}", said[0])

    @pytest.mark.parametrize(
        "header", [{"ss_network_alpha": "x"}, {"ss_network_alpha": "nan"}, {"ss_network_alpha": "-1"},
                   {"ss_network_alpha": "4", "ss_network_dim": "(3,)"}],
    )  # fmt: skip
    def test_kohyas_header_that_is_malformed(self, loras, factors, tmp_path, header):
        tensors = loras.as_musubi(factors)[0]
        open_lora(loras.save(tmp_path / "a.safetensors", tensors, header), warn=pytest.fail)  # they say it themselves
        tensors = {k: x for k, x in tensors.items() if not k.endswith("alpha")}
        entry, text = list(header.items())[-1]
        with pytest.raises(
            ValueError, match=re.escape(f'{entry} in its header is "{text}", not a number of 0 or more')
        ):
            open_lora(loras.save(tmp_path / "b.safetensors", tensors, header))

    def test_zero_is_said(self, loras, factors, tmp_path):
        said = []
        lora = open_lora(loras.save(tmp_path / "a.safetensors", *loras.as_musubi(factors, alpha=0.0)), warn=said.append)
        assert not lora.delta(f"{Q}.weight").any()
        [line] = said
        assert "has an alpha of 0 for 20 of 20 layers, such as blocks.0." in line

    def test_beside_the_file(self, loras, factors, tmp_path):
        tensors = {
            f"base_model.model.{k.removeprefix('transformer.')}": x for k, x in loras.as_diffusers(factors)[0].items()
        }
        loras.save(tmp_path / "adapter_model.safetensors", tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6, "alpha_pattern": {}}))
        lora = open_lora(tmp_path, warn=pytest.fail)
        assert lora.said == "adapter_config.json"
        np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(factors, Q, 2.0), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["{}.lora_A.default.weight {}.lora_B.default.weight", "pipe.dit.{}.lora_A.weight pipe.dit.{}.lora_B.weight",
     "model.diffusion_model.{}.lora_down.weight model.diffusion_model.{}.lora_up.weight",
     "diffusion_model.{}.lora.down.weight diffusion_model.{}.lora.up.weight"],
)  # fmt: skip
def test_other_spellings(loras, factors, tmp_path, name):
    down, up = (part.format(Q) for part in name.split())
    lora = open_lora(loras.save(tmp_path / "a.safetensors", {down: factors[Q][0], up: factors[Q][1]}))
    np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(factors, Q, 1.0), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_multiplied_in_float32(loras, factors, tmp_path, dtype):
    half = {name: tuple(x.astype(dtype) for x in pair) for name, pair in factors.items()}
    lora = open_lora(loras.save(tmp_path / "a.safetensors", *loras.as_musubi(half)))
    np.testing.assert_allclose(lora.delta(f"{Q}.weight"), product(half, Q, 2 / 3), atol=1e-6)


def test_integers_have_no_scale(loras, factors, tmp_path):
    whole = {Q: tuple((9 * x).astype(np.int8) for x in factors[Q])}
    lora = open_lora(loras.save(tmp_path / "a.safetensors", *loras.as_musubi(whole)))
    with pytest.raises(ValueError, match=r"a\.safetensors: lora_unet_blocks_1_.* is int8 without a scale"):
        lora.delta(f"{Q}.weight")


def test_whole_differences(loras, factors, wan, small, tmp_path):
    """Of few-step LoRAs: norms, biases, tables of modulations, the head, the patch embedding."""
    rng = np.random.default_rng(0)
    dim, n_in, n_out = small.dim, small.in_channels, small.out_channels
    names = {
        "blocks.0.diff_m": ("blocks.0.modulation", (1, 6, dim)),
        "blocks.1.modulation.diff": ("blocks.1.modulation", (1, 6, dim)),
        "head.modulation.diff": ("head.modulation", (1, 2, dim)),
        "blocks.0.norm3.diff": ("blocks.0.norm3.weight", (dim,)),
        "blocks.0.norm3.diff_b": ("blocks.0.norm3.bias", (dim,)),
        "blocks.1.self_attn.norm_k.diff": ("blocks.1.self_attn.norm_k.weight", (dim,)),
        "blocks.1.cross_attn.v.diff_b": ("blocks.1.cross_attn.v.bias", (dim,)),
        "head.head.diff": ("head.head.weight", (4 * n_out, dim)),
        "head.head.diff_b": ("head.head.bias", (4 * n_out,)),
        "patch_embedding.diff": ("patch_embedding.weight", (dim, n_in, 1, 2, 2)),
        "patch_embedding.diff_b": ("patch_embedding.bias", (dim,)),
        "text_embedding.0.diff_b": ("text_embedding.0.bias", (dim,)),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape) in names.items()}
    tensors = loras.as_comfyui({Q: factors[Q]})[0] | {f"diffusion_model.{name}": x for name, x in arrays.items()}
    file = loras.save(tmp_path / "a.safetensors", tensors)
    lora = open_lora(file)
    assert lora.changes.keys() == {official for official, _ in names.values()} | {f"{Q}.weight"}
    before = wan.model(small)
    found, base = flat(merged(before, opened([f"{file}:-0.5"]))), flat(before)
    changed = {name for name in base if not np.array_equal(base[name], found[name])}
    assert changed == {
        *("blocks.modulation", "head.modulation", "blocks.norm3.scale", "blocks.norm3.bias", "head.proj.kernel"),
        *("blocks.self_attn.norm_k.scale", "blocks.cross_attn.v.bias", "head.proj.bias", "patch_embedding.kernel"),
        *("patch_embedding.bias", "text_embedding.fc1.bias", "blocks.self_attn.q.kernel"),
    }  # fmt: skip

    def wanted(ours, array):
        return base[ours] - np.float32(0.5) * array

    table = base["blocks.modulation"][0] - np.float32(0.5) * arrays["blocks.0.diff_m"]
    np.testing.assert_array_equal(found["blocks.modulation"][0], table)
    np.testing.assert_array_equal(found["head.proj.kernel"], wanted("head.proj.kernel", arrays["head.head.diff"].T))
    kernel = arrays["patch_embedding.diff"].transpose(2, 3, 4, 1, 0)
    np.testing.assert_array_equal(found["patch_embedding.kernel"], wanted("patch_embedding.kernel", kernel))
    q = base["blocks.self_attn.q.kernel"][1] - product(factors, Q, 1 / 3).T
    np.testing.assert_allclose(found["blocks.self_attn.q.kernel"][1], q, atol=1e-6)
    np.testing.assert_array_equal(found["blocks.self_attn.q.kernel"][0], base["blocks.self_attn.q.kernel"][0])
    # and again under other names
    again = open_lora(rewrite_lora(lora, tmp_path / "b.safetensors", format="musubi"))
    for name in lora.changes:
        np.testing.assert_allclose(again.delta(name), lora.delta(name), atol=1e-7)


class TestMerging:
    @pytest.mark.parametrize(("dtype", "format"), [("float32", "official"), ("bfloat16", "diffusers")])
    def test_checkpoint_and_model_are_the_same(self, loras, factors, wan, small, tmp_path, dtype, format):
        model = wan.model(small, param_dtype=dtype)
        before = {name: array.copy() for name, array in flat(model).items()}
        source = open_source(save_checkpoint(model, tmp_path / "base", format=format))
        names = [
            loras.save(tmp_path / f"{i}.safetensors", *loras.as_musubi(loras.factors(small, seed=i))) for i in (1, 2)
        ]
        given = opened([f"{names[0]}:0.3", f"{names[1]}:-1.5"])
        found = flat(merged(model, given))
        for _ in range(2):  # loading again gives the same
            loaded = flat(load_source(with_loras(source, given), param_dtype=dtype))
            assert all(np.array_equal(loaded[name], found[name]) for name in found)
        name = "blocks.self_attn.q.kernel"
        wanted = before[name][1].astype(np.float32)
        for i, scale in ((1, 0.3), (2, -1.5)):
            wanted += product(loras.factors(small, seed=i), Q, scale * 2 / 3).T
        tolerance = 2e-6 if dtype == "float32" else 2**-8 * np.abs(wanted).max()
        assert found[name].dtype.name == dtype
        np.testing.assert_allclose(found[name][1].astype(np.float32), wanted, atol=tolerance)
        assert all(np.array_equal(array, before[name]) for name, array in flat(model).items())
        assert all(np.array_equal(array, before[name]) for name, array in flat(load_source(source)).items())

    def test_array_is_left_as_it_is(self, loras, factors, tmp_path):
        given = opened([str(loras.save(tmp_path / "a.safetensors", *loras.as_musubi(factors)))])
        weight = np.ones((48, 48), np.float32)
        once, twice = (merge_arrays(weight, f"{Q}.weight", given) for _ in range(2))
        assert (weight == 1).all()
        np.testing.assert_array_equal(once, twice)
        assert merge_arrays(weight, "blocks.0.norm3.weight", given) is weight


def drop(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


M = "lora_unet_blocks_1_self_attn_q"
BROKEN = {
    "half": (lambda t: drop(t, f"{M}.lora_up.weight"), "lacks the up matrix of blocks.1.self_attn.q"),
    "alpha alone": (lambda t: drop(drop(t, f"{M}.lora_up.weight"), f"{M}.lora_down.weight"), "lacks the down matrix"),
    "ranks": (lambda t: t | {f"{M}.lora_up.weight": np.ones((48, 5), np.float32)}, r"must be \[rank, in\]"),
    "unknown": (lambda t: t | {"lora_unet_blocks_1_gate.lora_up.weight": np.ones(3)}, "1 of 61 .*_1_gate"),
    "text encoder": (lambda t: t | {"lora_te_text_model.alpha": np.ones(())}, "for a text encoder, not for Wan"),
    "bias of none": (lambda t: t | {"lora_unet_blocks_1_self_attn_norm_q.diff_b": np.ones(48)}, "changes a bias, but"),
    "twice": (lambda t: t | {f"{M}.lora_A.weight": np.ones((3, 48))}, "are the same part"),
    "several alphas": (lambda t: t | {f"{M}.alpha": np.ones(2)}, "not one number"),
    "NaN alpha": (lambda t: t | {f"{M}.alpha": np.float32(np.nan)}, "NaN or infinite"),
    "LoKr": (lambda t: {f"{M}.lokr_w1": np.ones((2, 2))}, "holds LoKr"),
    "LoHa": (lambda t: {f"{M}.hada_w1_a": np.ones((2, 2))}, "holds LoHa"),
    "DoRA": (lambda t: t | {f"{M}.dora_scale": np.ones(48)}, "holds DoRA"),
    "OFT": (lambda t: {f"{M}.oft_blocks": np.ones((2, 2))}, "holds OFT"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(loras, factors, tmp_path, name):
    change, message = BROKEN[name]
    file = loras.save(tmp_path / "a.safetensors", change(loras.as_musubi(factors)[0]))
    with pytest.raises(ValueError, match=message) as raised:
        open_lora(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_that_are_none(loras, factors, tmp_path):
    tensors = loras.as_musubi(factors)[0]
    tensors[f"{M}.lora_up.weight"] = tensors[f"{M}.lora_up.weight"] * np.float32(np.nan)
    lora = open_lora(loras.save(tmp_path / "a.safetensors", tensors))
    with pytest.raises(ValueError, match="NaN or infinite"):
        lora.delta(f"{Q}.weight")


OTHERS = {
    "transformer.single_transformer_blocks.0.attn.to_q": "Flux or HunyuanVideo",
    "lora_unet_double_blocks_0_img_attn_proj": "Flux or HunyuanVideo",
    "lora_unet_down_blocks_0_attentions_0_proj_in": "Stable Diffusion",
    "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": "Stable Diffusion",
    "transformer.transformer_blocks.0.attn.add_q_proj": "another diffusion transformer",
    "diffusion_model.vace_blocks.0.self_attn.q": "Wan VACE",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(loras, tmp_path, name):
    pair = {f"{name}.lora_A.weight": np.ones((2, 4)), f"{name}.lora_B.weight": np.ones((4, 2))}
    file = loras.save(tmp_path / "a.safetensors", pair)
    with pytest.raises(ValueError, match=f"{file} is for .*{OTHERS[name]}.*, not for Wan 2.1"):
        open_lora(file)


class TestOtherModels:
    def opened(self, loras, path, names, width):
        pairs = {name: (np.zeros((2, width), np.float32), np.zeros((width, 2), np.float32)) for name in names}
        return open_lora(loras.save(path / "a.safetensors", loras.as_comfyui(pairs)[0]))

    def test_larger(self, loras, tmp_path):
        lora = self.opened(loras, tmp_path, ["blocks.0.self_attn.q", "blocks.39.self_attn.q"], 5120)
        with pytest.raises(ValueError, match=r"is a LoRA for Wan 2.1 14B \(width 5120, 40 blocks\), but Wan 2.1 1.3B .*"
                           r"loaded: blocks.0.self_attn.q.weight is \[1536, 1536\]"):  # fmt: skip
            lora.check(wan_config("wan2.1-t2v-1.3b"))
        lora.check(wan_config("wan2.1-t2v-14b"))

    def test_image_to_video(self, loras, tmp_path):
        lora = self.opened(loras, tmp_path, ["blocks.0.self_attn.q", "blocks.0.cross_attn.k_img"], 5120)
        with pytest.raises(
            ValueError, match=r"14B \(.*image-to-video\), but .*text-to-video\) is loaded: it has no .*k_img"
        ):
            lora.check(wan_config("wan2.1-t2v-14b"))
        lora.check(wan_config("wan2.1-i2v-14b"))

    def test_more_blocks(self, loras, tmp_path, small):
        lora = self.opened(loras, tmp_path, ["blocks.9.self_attn.q"], small.dim)
        with pytest.raises(
            ValueError, match=r"10 blocks\), but .*2 blocks.* is loaded: it has no blocks.9.self_attn.q"
        ):
            lora.check(small)


def test_no_lora(wan, small, tmp_path):
    file = save_checkpoint(wan.model(small), tmp_path / "base") / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"is not a LoRA: it holds "):
        open_lora(file)
    with pytest.raises(ValueError, match=r"does not exist; give a .safetensors file or a run folder"):
        open_lora(tmp_path / "none.safetensors")


def test_paths_with_colons(tmp_path):
    file = tmp_path / "a:2"
    file.touch()
    assert parse_scaled(str(file)) == (str(file), 1.0)
    assert parse_scaled(f"{file}:0.5") == (str(file), 0.5)
    assert parse_scaled("10:30.safetensors") == ("10:30.safetensors", 1.0)
    assert parse_scaled("b:-2") == ("b", -2.0)
    for text in (":1", "b:inf", "b:nan"):
        with pytest.raises(ValueError, match="strength"):
            parse_scaled(text)


def test_a_bias_of_a_pair_counts_as_the_pair_does(loras, factors, tmp_path):
    tensors, _ = loras.as_comfyui({Q: factors[Q]}, endings=("lora_A", "lora_B"))
    bias = np.arange(factors[Q][1].shape[0], dtype=np.float32)
    file = loras.save(tmp_path / "a.safetensors", tensors | {f"diffusion_model.{Q}.lora_B.bias": bias})
    np.testing.assert_allclose(open_lora(file).delta(f"{Q}.bias"), bias * np.float32(2 / 3), rtol=1e-6)


def test_the_last_that_says_how_it_is_sampled_counts(loras, factors, small, tmp_path):
    """Also against what the checkpoint says; one that says nothing changes nothing."""
    files = []
    for number, (own, few) in enumerate((({"shift": 3.0}, True), ({"shift": 8.0}, False), (None, None))):
        settings = None if own is None else {"attention": "dense", "trained": own, "few_step": few}
        metadata = {} if settings is None else {OWN_KEY: json.dumps(settings)}
        tensors, header = loras.as_comfyui({Q: factors[Q]})
        file = loras.save(tmp_path / f"{number}.safetensors", tensors, header | metadata)
        files.append(Scaled(open_lora(file)))
    before = AsTrained(small, True, Trained(shift=5.0))
    assert as_trained(before, files[2:]) == before
    for order, shift, few in (((0, 1, 2), 8.0, False), ((1, 0, 2), 3.0, True), ((0,), 3.0, True)):
        said = as_trained(before, [files[n] for n in order])
        assert (said.trained, said.few_step) == (Trained(shift=shift), few)


class TestWriting:
    def test_different_ranks_and_alphas(self, loras, small, tmp_path):
        """Diffusers' header names those that differ."""
        one, two = loras.factors(small, rank=2), loras.factors(small, rank=5, seed=1)
        mixed = {n: Factors(*(two if "ffn" in n else one)[n], alpha=7.0 if "ffn" in n else 2.0) for n in one}
        lora = open_lora(write_lora(tmp_path / "a.safetensors", mixed, format="diffusers"), warn=pytest.fail)
        for name in ("blocks.0.ffn.0", Q):
            alpha, rank = (7, 5) if "ffn" in name else (2, 2)
            np.testing.assert_allclose(
                lora.delta(f"{name}.weight"), product(two if "ffn" in name else one, name, alpha / rank), atol=1e-5
            )

    def test_refused(self, loras, factors, tmp_path):
        given = {Q: Factors(*factors[Q], alpha=1.0)}
        for options, message in (
            ({"format": "kohya"}, "choices: 'diffusers'"),
            ({"dtype": "int8"}, "choices: 'float32'"),
            ({"format": "diffusers", "whole": {"blocks.0.modulation": np.ones(3)}}, "no names for differences"),
        ):
            with pytest.raises(ValueError, match=message):
                write_lora(tmp_path / "a.safetensors", given, **untyped(options))
        with pytest.raises(ValueError, match="does not end in"):
            write_lora(tmp_path / "a.pt", given)
        file = write_lora(tmp_path / "a.safetensors", given)
        with pytest.raises(ValueError, match="exists"):
            write_lora(file, given)
