"""Frames come early and in order, are those of one decode of everything, and survive Ctrl-C."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import FrameDecoder, PatchDecoder, WanDecoder, frames_of
from monarchrt.models.generate.make import comparison_path, make_video
from monarchrt.models.generate.material import unrolled_if_asked
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.media.video import read_clip
from monarchrt.models.media.writer import read_settings
from monarchrt.models.vae import WanVAE, vae_config
from monarchrt.models.wan import MonarchAttention
from monarchrt.models.wan.unrolled import UnrolledWan
from tests.untyped import there, untyped

DCT = PatchDCT(patch=2, whitening=1.0)
TEXT = jnp.ones((1, 3, 20))


@pytest.fixture
def tiny(wan):
    """A pipeline and a maker of plans, frames 16 x 24 at 2 pixels a latent: 4 x 6 tokens."""
    model = wan.model(num_layers=1, in_channels=12, out_channels=12, attention=MonarchAttention(tile=(1, 4, 6)))

    def plan(**given):
        config = GenerateConfig(**untyped(dict(frames=9, height=16, width=24, quiet=True, zoom=1, steps=2) | given))
        defaults = Defaults(mode="autoregressive", sampler="euler", guidance=1.0)
        return make_plan(config, defaults=defaults, model=model.config, spatial=2, temporal=1)

    return VideoPipeline(model, PatchDecoder(DCT)), plan


@contextlib.contextmanager
def compiled():
    """The names of the programs that are compiled meanwhile."""
    programs = []

    def listen(event: str, duration_secs: float, **named: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(named["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def vae():
    return WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0))


class TestDecoders:
    def test_patches(self):
        decoder = PatchDecoder(DCT)
        video = np.random.default_rng(0).integers(0, 255, (1, 3, 16, 24, 3), np.uint8)
        latents = decoder.encode(video)
        np.testing.assert_array_equal(latents, DCT.encode(video))
        frames, _ = decoder.decode(latents, decoder.start(1, 8, 12))
        np.testing.assert_array_equal(frames, video)
        assert isinstance(decoder, FrameDecoder)

    @pytest.mark.slow
    def test_wans_vae_block_by_block_is_the_whole(self):
        """Blocks of 3 latents: 9 frames, then 12 each; the same as all at once."""
        jax.clear_caches()  # another test may have compiled the same programs
        model = vae()
        decoder = WanDecoder(model)
        latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 2, 3, 16)), jnp.float32)
        state, parts = decoder.start(1, 2, 3), []
        with compiled() as programs:
            decoder.prepare(1, [3, 3, 3], 2, 3)
            decoder.prepare(1, [3, 3, 3], 2, 3)
            for start in (0, 3, 6):
                frames, state = decoder.decode(latents[:, start : start + 3], state)
                parts.append(np.asarray(frames))
        # in the background, and each once
        decodes = sorted(name for name in programs if "decode" in name)
        assert decodes == ["jit(_decode_first)", "jit(_decode_next)", "jit(_decode_rest)"]
        assert [part.shape[1] for part in parts] == [9, 12, 12]
        assert frames_of(decoder, 9) == 33
        whole = np.rint((np.asarray(nnx.jit(WanVAE.decode)(model, latents)) + 1) * 127.5)
        joined = np.concatenate(parts, axis=1)
        assert np.abs(joined - whole).max() <= 1
        assert (joined == whole).mean() > 0.999
        assert decoder.encode(joined[:, :1]).shape == (1, 1, 2, 3, 16)
        assert isinstance(decoder, FrameDecoder)

    def test_what_fails_in_the_background_is_heard(self, monkeypatch):
        decoder = WanDecoder(vae())
        monkeypatch.setattr(WanVAE, "decode_first", lambda *_: 1 / 0)
        decoder.prepare(1, [1], 2, 3)
        with pytest.raises(ZeroDivisionError):
            decoder.decode(jnp.zeros((1, 1, 2, 3, 16)), decoder.start(1, 2, 3))


class TestPipeline:
    def test_unrolled_layers_make_the_same_frames(self, tiny):
        pipeline, plan = tiny
        asked = dataclasses.replace(plan().config, unroll_layers="yes")
        unrolled = VideoPipeline(unrolled_if_asked(pipeline.model, asked), pipeline.decoder)
        assert isinstance(unrolled.network, UnrolledWan)
        assert unrolled_if_asked(pipeline.model, plan().config) is pipeline.model
        expected, made = (np.concatenate(list(each(TEXT, plan=plan()))).astype(int) for each in (pipeline, unrolled))
        assert np.abs(made - expected).max() <= 1

    @pytest.mark.parametrize("given", [{}, dict(mode="bidirectional"), dict(mode="windows", window=4, frames=8)])
    def test_frames_are_the_decoded_latents(self, tiny, given):
        pipeline, plan = tiny
        latents = np.concatenate(list(pipeline.latents(TEXT, plan=plan(**given))), axis=1)
        video = np.concatenate(list(pipeline(TEXT, plan=plan(**given))))
        np.testing.assert_array_equal(video, DCT.decode(latents[0]))
        assert len(video) == plan(**given).config.frames
        assert video.std() > 5

    def test_the_next_block_is_under_way_before_frames_are_waited_for(self, tiny, monkeypatch):
        pipeline, plan = tiny
        events = []
        decode, latents = pipeline.decoder.decode, pipeline.latents

        def noted_latents(*args, **options):
            for n, part in enumerate(latents(*args, **options)):
                events.append(f"network {n}")
                yield part

        def noted_decode(part, state):
            events.append("decoder")
            return decode(part, state)

        copy = type(TEXT).copy_to_host_async

        def noted_copy(array):
            if array.ndim == 5:
                events.append("copy")
            copy(array)

        monkeypatch.setattr(pipeline.decoder, "decode", noted_decode)
        monkeypatch.setattr(pipeline, "latents", noted_latents)
        monkeypatch.setattr("monarchrt.models.generate.decoders.on_cpu", lambda array: False)  # as on a GPU
        monkeypatch.setattr(type(TEXT), "copy_to_host_async", noted_copy)
        for n, _ in enumerate(pipeline(TEXT, plan=plan())):
            events.append(f"frames {n}")
        assert events == [
            *["network 0", "decoder", "copy", "network 1", "decoder", "copy", "frames 0"],
            *["network 2", "decoder", "copy", "frames 1", "frames 2"],
        ]

    def test_the_seed_decides(self, tiny):
        pipeline, plan = tiny
        one, again, other = (np.concatenate(list(pipeline(TEXT, plan=plan(seed=seed)))) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert np.abs(one.astype(int) - other).mean() > 5

    def test_guidance_needs_the_negative_text(self, tiny):
        pipeline, plan = tiny
        plain = np.concatenate(list(pipeline(TEXT, plan=plan(), negative=-TEXT)))
        np.testing.assert_array_equal(plain, np.concatenate(list(pipeline(TEXT, plan=plan()))))
        guided = np.concatenate(list(pipeline(TEXT, plan=plan(guidance=9.0), negative=-TEXT)))
        assert (guided != plain).any()


def test_a_process_may_end_while_frames_are_on_their_way():
    """In a process of its own, which was aborted: by an error, a full disk, or Ctrl-C."""
    program = (
        "import jax, jax.numpy as jnp; from monarchrt.models.generate.decoders import to_host\n"
        "f = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ y), x))\n"
        "x = f(jnp.ones((1000, 1000))).block_until_ready()\n"
        "made = [f(x + n) for n in range(3)]; to_host(*made)\n"
        "raise SystemExit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")


class TestMakeVideo:
    def test_a_file_that_knows_how_it_was_made(self, tiny, tmp_path):
        pipeline, plan = tiny
        out = tmp_path / "new" / "clip.mp4"
        made = plan(out=out, seed=4, prompt="a cat", fps=8.0, quality=1)
        result = make_video(pipeline, TEXT, plan=made)
        assert (result.frames, result.path) == (9, out)
        assert 0 < result.first_frame <= result.seconds
        stored = read_settings(out)
        assert (stored["seed"], stored["prompt"], stored["steps"], stored["shift"]) == (4, "a cat", 2, 5.0)
        expected = np.concatenate(list(pipeline(TEXT, plan=made)))
        assert np.abs(read_clip(out, height=16, width=24).astype(int) - expected).mean() < 12

    @pytest.mark.parametrize(
        ("name", "frame"), [("a.mkv", None), ("frames", "{:05d}.png"), ("x%03d.png", "x{:03d}.png")]
    )
    def test_exact_frames(self, tiny, tmp_path, name, frame):
        pipeline, plan = tiny
        out = tmp_path / name
        made = plan(out=out, seed=4)
        assert make_video(pipeline, TEXT, plan=made).frames == 9
        folder = out if out.is_dir() else tmp_path
        files = [out] if frame is None else [folder / frame.format(index) for index in range(9)]
        read = np.concatenate([read_clip(file, height=16, width=24) for file in files])
        np.testing.assert_array_equal(read, np.concatenate(list(pipeline(TEXT, plan=made))))
        assert read_settings(out)["seed"] == 4

    def test_zoom(self, tiny, tmp_path):
        pipeline, plan = tiny
        make_video(pipeline, TEXT, plan=plan(out=tmp_path / "a.mp4", zoom=3))
        assert read_clip(tmp_path / "a.mp4", height=48, width=72).shape == (9, 48, 72, 3)

    def test_comparison_with_dense(self, tiny, tmp_path):
        pipeline, plan = tiny
        result = make_video(
            pipeline, TEXT, plan=plan(out=tmp_path / "a.mp4", compare_dense=True), report=lambda _: None
        )
        assert result.comparison == comparison_path(tmp_path / "a.mp4")
        assert 5 < there(result.fidelity).psnr < 60
        assert -1 <= there(result.fidelity).ssim < 1
        assert read_clip(there(result.comparison), height=34, width=52).shape == (9, 34, 52, 3)
        with pytest.raises(UserError, match="attention is dense; give a --tile"):
            make_video(pipeline, TEXT, plan=plan(out=tmp_path / "b.mp4", compare_dense=True, attention="dense"))

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_ctrl_c_keeps_frames(self, tiny, tmp_path, monkeypatch, after):
        pipeline, plan = tiny
        out, real = tmp_path / "a.mp4", VideoPipeline._decoded

        def stopped(self, parts, plan):
            for n, frames in enumerate(real(self, parts, plan)):
                if n == after:
                    raise KeyboardInterrupt
                yield frames

        monkeypatch.setattr(VideoPipeline, "_decoded", stopped)
        kept = f"{3 * after} of 9 frames are kept" if after else "no frame was ready"
        with pytest.raises(KeyboardInterrupt, match=kept):
            make_video(pipeline, TEXT, plan=plan(out=out))
        assert out.exists() == bool(after)
        if after:
            assert len(read_clip(out, height=16, width=24)) == 3 * after
        assert not list(tmp_path.glob("*.part"))

    def test_an_error_keeps_the_frames_so_far_and_says_so(self, tiny, tmp_path, monkeypatch):
        """Such as of a collective, when another process that makes the video with this one is lost."""
        pipeline, plan = tiny
        out, real = tmp_path / "a.mp4", VideoPipeline._decoded

        def lost(self, parts, plan):
            yield next(real(self, parts, plan))
            raise RuntimeError("lost")

        monkeypatch.setattr(VideoPipeline, "_decoded", lost)
        said: list[str] = []
        with pytest.raises(RuntimeError, match="lost"):
            make_video(pipeline, TEXT, plan=plan(out=out), report=said.append)
        assert said == [f"3 of 9 frames are kept in {out}, generated before an error"]
        assert len(read_clip(out, height=16, width=24)) == 3

    def test_a_video_that_another_process_made_meanwhile_stays(self, tiny, tmp_path):
        pipeline, plan = tiny
        out = tmp_path / "a.mp4"
        out.write_bytes(b"another's")  # `check_outputs` would have refused it earlier
        with pytest.raises(
            UserError, match=r"a\.mp4 was created by another process meanwhile; .* kept as .*a-\d+\.mp4"
        ):
            make_video(pipeline, TEXT, plan=plan(out=out))
        assert out.read_bytes() == b"another's"
        (kept,) = tmp_path.glob("a-*.mp4")
        assert len(read_clip(kept, height=16, width=24)) == 9
        make_video(pipeline, TEXT, plan=plan(out=out, overwrite=True))
        assert len(read_clip(out, height=16, width=24)) == 9

    def test_ctrl_c_in_the_comparison_keeps_the_video(self, tiny, tmp_path, monkeypatch):
        pipeline, plan = tiny

        def stopped(parts, video, plan):
            raise KeyboardInterrupt

        monkeypatch.setattr("monarchrt.models.generate.make._compare", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"a\.mp4 is whole, but not compared"):
            make_video(pipeline, TEXT, plan=plan(out=tmp_path / "a.mp4", compare_dense=True), report=lambda _: None)
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
        assert len(read_clip(tmp_path / "a.mp4", height=16, width=24)) == 9

    def test_what_the_attention_refuses_is_said_in_one_line(self, tiny, tmp_path, monkeypatch):
        pipeline, plan = tiny

        def refused(self, parts, plan):
            raise NotImplementedError("implementation='x' cannot run this call")
            yield

        monkeypatch.setattr(VideoPipeline, "_decoded", refused)
        with pytest.raises(UserError, match="implementation='x' cannot run this call"):
            make_video(pipeline, TEXT, plan=plan(out=tmp_path / "a.mp4"))
        assert not list(tmp_path.iterdir())


def test_latents_that_are_not_finite(tiny, tmp_path):
    pipeline, plan = tiny
    with pytest.raises(UserError, match="the latents are NaN or infinite"):
        make_video(pipeline, jnp.nan * TEXT, plan=plan(out=tmp_path / "a.mp4"))
    assert not list(tmp_path.iterdir())


def test_settings_are_json(tmp_path):
    config = GenerateConfig(out=tmp_path / "a.mp4", embeddings=tmp_path / "e", tile=(1, 2, 3))
    stored = json.loads(json.dumps(config.stored()))
    assert "out" not in stored
    assert (stored["attention"], stored["tile"]) == ("monarch(tile=(1,2,3))", None)
    assert set(stored) < {field.name for field in dataclasses.fields(GenerateConfig)}


def test_nothing_is_compiled_after_the_second_block(tiny):
    """Network and decoder: one program for all blocks."""
    pipeline, plan = tiny
    frames = pipeline(TEXT, plan=plan(frames=15))
    next(frames)
    with compiled() as programs:
        list(frames)
    assert not programs


def test_frames_that_are_not_finite(tiny, tmp_path):
    """Weights of a decoder that are NaN: the latents are numbers, and a file of them would be black."""
    pipeline, plan = tiny
    pipeline.decoder._synthesis = pipeline.decoder._synthesis.at[0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="the decoded frames are NaN or infinite, though the latents are not"):
        make_video(pipeline, TEXT, plan=plan(out=tmp_path / "a.mp4"))
    assert not list(tmp_path.iterdir())


def test_pixels_of_a_vae_that_are_not_finite():
    vae = WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0))
    for part, bad in ((vae, False), (jax.tree.map(lambda x: x * jnp.nan, nnx.state(vae)), True)):
        if bad:
            nnx.update(vae, part)
        decoder = WanDecoder(vae)
        state = decoder.start(1, 2, 3)
        for _ in range(2):
            _, state = decoder.decode(jnp.zeros((1, 2, 2, 3, 16)), state)
            assert bool(decoder.finite(state)) != bad
