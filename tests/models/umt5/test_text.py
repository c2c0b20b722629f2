import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.umt5 import (
    Tokenizer,
    UMT5Encoder,
    clean_text,
    encode_prompts,
    load_embeddings,
    save_embeddings,
    umt5_config,
)
from tests.models.umt5.conftest import SMALL, WORDS, write_tokenizer

ID = {word: 3 + i for i, word in enumerate(WORDS)}


def no_warning(text):
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\t cat\n\non  the wall ", "a cat on the wall"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("cafÃ©", "café"),  # UTF-8 read as Latin-1
        ("“quoted”", '"quoted"'),
    ],
)
def test_cleaning(text, clean):
    assert clean_text(text) == clean


class TestTokenizer:
    def test_ids(self, tokenizer):
        ids, mask = tokenizer([" a cat &amp;amp; the  dog", "wall"], warn=no_warning)
        assert ids.shape == mask.shape == (2, 512)
        assert ids.dtype == np.int32
        assert ids[0, :7].tolist() == [ID["a"], ID["cat"], ID["&"], ID["the"], ID["dog"], 1, 0]
        assert mask.sum(axis=1).tolist() == [6, 2]
        assert mask[0, :6].all()

    def test_is_transformers(self, tmp_path, tokenizer):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
        )
        prompts = ["a cat on the wall", "dog " * 30, "nothing known"]
        expected = theirs(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="np")
        ids, mask = tokenizer(prompts, length=16, warn=lambda text: None)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))

    def test_a_long_prompt_is_cut_and_says_so(self, tokenizer):
        notes = []
        ids, mask = tokenizer(["red " * 511, "red " * 512], warn=notes.append)
        assert notes == [f"the prompt {('red ' * 10)[:40] + '...'!r} has 513 tokens and is cut to 512"]
        assert mask.all()
        np.testing.assert_array_equal(ids[0], ids[1])
        assert ids[1, -1] == 1

    def test_an_end_token_is_appended_if_the_file_does_not(self, tmp_path, tokenizer):
        other = Tokenizer.load(write_tokenizer(tmp_path / "other", end=False))
        np.testing.assert_array_equal(other(["a cat"])[0], tokenizer(["a cat"])[0])

    @pytest.mark.parametrize("inside", ["tokenizer", "google/umt5-xxl", "."])
    def test_folders(self, tmp_path, inside):
        write_tokenizer(tmp_path / "model" / inside)
        assert Tokenizer.load(tmp_path / "model").end == 1

    @pytest.mark.parametrize("prompt", ["", "  \n", "&nbsp;"])
    def test_an_empty_prompt(self, tokenizer, prompt):
        with pytest.raises(UserError, match=r"prompt .* is empty; describe what the video shows"):
            tokenizer(["a cat", prompt])

    def test_errors(self, tmp_path, tokenizer):
        with pytest.raises(UserError, match="is not a sequence of texts"):
            tokenizer("a cat")
        with pytest.raises(UserError, match=r"has no tokenizer.json, nor has its tokenizer or google/umt5-xxl"):
            Tokenizer.load(tmp_path / "only")
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "spiece.model").write_bytes(b"x")
        with pytest.raises(UserError, match=r"only has only spiece.model, .*AutoTokenizer.from_pretrained"):
            Tokenizer.load(tmp_path / "only")
        (tmp_path / "only" / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match=r"tokenizer.json cannot be read: "):
            Tokenizer.load(tmp_path / "only")
        import tokenizers

        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "x": 1}, unk_token="x"))
        inner.save(str(tmp_path / "only" / "tokenizer.json"))
        with pytest.raises(UserError, match=r"lacks the token </s>; it is not umT5's"):
            Tokenizer.load(tmp_path / "only")


class TestEncodePrompts:
    def test_zeros_past_the_end(self, encoder, tokenizer):
        out = np.stack(list(encode_prompts(["a cat on", "dog"], encoder=encoder, tokenizer=tokenizer)))
        assert out.shape == (2, 512, SMALL.dim)
        assert not out[0, 4:].any()
        assert not out[1, 2:].any()
        short = encoder(jnp.array([[ID["a"], ID["cat"], ID["on"], 1]], jnp.int32), jnp.ones((1, 4), bool))
        assert np.abs(short).min() > 0
        np.testing.assert_allclose(out[0, :4], short[0], atol=1e-5)

    def test_the_device_holds_one_prompt_at_a_time(self, encoder, tokenizer):
        prompts = ["a cat on", "dog", "a dog", "cat"]
        kept = []
        for embedding in encode_prompts(prompts, encoder=encoder, tokenizer=tokenizer, length=37):
            kept.append(embedding)
            assert isinstance(embedding, np.ndarray)
            assert sum(array.shape[-2:] == (37, SMALL.dim) for array in jax.live_arrays()) == 0
        for prompt, embedding in zip(prompts, kept, strict=True):
            (alone,) = encode_prompts([prompt], encoder=encoder, tokenizer=tokenizer, length=37)
            np.testing.assert_array_equal(embedding, alone)

    def test_a_tokenizer_of_another_model(self, tokenizer):
        few = UMT5Encoder(umt5_config("tiny", vocab_size=4), rngs=nnx.Rngs(0))
        with pytest.raises(UserError, match="the tokenizer gives id 5; the encoder knows 4"):
            next(encode_prompts(["a cat on"], encoder=few, tokenizer=tokenizer))


class TestFiles:
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
    def test_round_trip(self, tmp_path, dtype):
        rng = np.random.default_rng(0)
        texts = {
            "b": rng.standard_normal((512, 6)).astype(dtype),
            "ein Käse & 猫\n": rng.standard_normal((512, 6)).astype(dtype),
            "nothing": np.zeros((512, 6), dtype),
        }
        texts["b"][9:] = 0
        path = save_embeddings(tmp_path / "new" / "text.safetensors", texts)
        assert path.stat().st_size < 2 * 520 * 6 * texts["b"].itemsize  # the zero rows are not stored
        loaded = load_embeddings(path)
        assert list(loaded) == list(texts)
        for prompt, array in texts.items():
            assert loaded[prompt].dtype == array.dtype
            assert loaded[prompt].tobytes() == array.tobytes()
        assert load_embeddings(path, length=600)["b"].shape == (600, 6)
        with pytest.raises(UserError, match="has 512 rows, more than 100"):
            load_embeddings(path, length=100)

    def test_the_library_reads_it(self, tmp_path):
        safetensors = pytest.importorskip("safetensors")
        path = save_embeddings(tmp_path / "a", {"a cat": jnp.ones((3, 2), jnp.float32)})
        with safetensors.safe_open(str(path), "np") as file:
            assert file.metadata()["embedding.0000.prompt"] == "a cat"
            np.testing.assert_array_equal(file.get_tensor("embedding.0000"), np.ones((3, 2)))

    def test_errors(self, tmp_path):
        with pytest.raises(UserError, match="no embeddings were given"):
            save_embeddings(tmp_path / "a", {})
        with pytest.raises(UserError, match=r"the embedding of 'x' is float32\[1, 3, 2\]; it must be floats \[L, D\]"):
            save_embeddings(tmp_path / "a", {"x": np.zeros((1, 3, 2), np.float32)})
        with pytest.raises(UserError, match="does not exist"):
            load_embeddings(tmp_path / "a")
        (tmp_path / "a").write_bytes(b"hello")
        with pytest.raises(UserError, match=r"is not a file of text embeddings: .* is not a safetensors file"):
            load_embeddings(tmp_path / "a")
        import safetensors.numpy

        safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "b")
        with pytest.raises(UserError, match="make one with save_embeddings"):
            load_embeddings(tmp_path / "b")

    @pytest.mark.parametrize(
        ("shape", "rows", "said"),
        [
            ((3,), 3, r"the embedding of 'a cat' is \[3\]; it must be \[L, D\]"),
            ((3, 2), 2, "has 3 rows, more than 2"),
            ((3, 2), 10**12, "should have 1000000000000 rows, over 100000"),
            ((3, 2), "9" * 5000, "does not name the prompt of x"),
        ],
    )
    def test_rows_that_lie(self, tmp_path, shape, rows, said):
        import safetensors.numpy

        metadata = {"format": "monarchrt text embeddings", "x.prompt": "a cat", "x.rows": str(rows)}
        safetensors.numpy.save_file({"x": np.zeros(shape, np.float32)}, tmp_path / "a", metadata)
        with pytest.raises(UserError, match=said):
            load_embeddings(tmp_path / "a")

    def test_a_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = save_embeddings(tmp_path / "a", {"x": np.ones((2, 2), np.float32)})

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"cannot write .*a: No space left on device"):
            save_embeddings(path, {"y": np.ones((2, 2), np.float32)})
        assert list(load_embeddings(path)) == ["x"]
        assert list(tmp_path.iterdir()) == [path]
