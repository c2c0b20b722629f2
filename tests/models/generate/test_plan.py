"""What was not said is filled in, what cannot be is refused with something that can."""

import dataclasses
from pathlib import Path

import pytest

from monarchrt.models.attention.notation import parse
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NEGATIVE_PROMPT, GenerateConfig, from_stored
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.sampling import Rollout, Windows
from monarchrt.models.wan import DenseAttention, MonarchAttention, wan_config
from tests.untyped import untyped

WAN = wan_config("wan2.1-t2v-1.3b")
CAUSAL = Defaults(mode="autoregressive", sampler="few-step")
WHOLE = Defaults(mode="bidirectional")


def plan(defaults=CAUSAL, *, model=WAN, **given):
    return make_plan(GenerateConfig(**given), defaults=defaults, model=model)


class TestDefaults:
    def test_self_forcing(self):
        made = plan()
        assert made.latents == (21, 60, 104)
        assert made.settings == Rollout(steps=4)
        assert made.settings.table().steps == 4
        assert not made.guides
        assert (made.config.frames, made.config.fps, made.config.zoom) == (81, 16.0, 1)

    def test_bidirectional(self):
        made = plan(WHOLE)
        assert made.settings == Windows(sampler="unipc", steps=50, shift=5.0, guidance=5.0)
        assert made.guides

    def test_given_settings_win(self):
        made = plan(WHOLE, sampler="euler", steps=7, shift=8.0, guidance=6.0, frames=33, height=240, width=416)
        assert made.settings == Windows(sampler="euler", steps=7, shift=8.0, guidance=6.0)
        assert made.latents == (9, 30, 52)

    def test_every_setting_of_a_sampler_is_passed_on(self):
        """None of them at its default."""
        common = dict(sampler="dpm++", steps=7, shift=3.5, guidance=2.5, context_noise=30.0)
        blocks = common | dict(block=2, independent_first_frame=True, window=7, sink_frames=1)
        parts = common | dict(window=6, context=2)
        for kind, mode, given in ((Rollout, "autoregressive", blocks), (Windows, "windows", parts)):
            made = plan(WHOLE, mode=mode, frames=41, **untyped(given)).settings
            assert dataclasses.asdict(made) == given
            assert all(getattr(kind(), name) != value for name, value in given.items())

    @pytest.mark.parametrize(
        ("mode", "suits"), [("bidirectional", "whole clips suit"), ("windows", "windows that continue each other suit")]
    )
    def test_block_by_block_a_network_that_is_not_is_told_what_suits_it(self, mode, suits):
        """That runs: a whole clip of a network of windows would have more frames than its tile divides."""
        model = dataclasses.replace(WAN, attention=MonarchAttention(tile=(4, 30, 52)))
        defaults = Defaults(mode=mode, causal=False, window=4, frames=61 if mode == "bidirectional" else 65)
        (note,) = plan(defaults, model=model, mode="autoregressive", sampler="unipc").notes[1:]
        assert note.endswith(f"{suits} it: monarchrt generate --mode {mode}")
        assert plan(defaults, model=model, mode=mode).config.mode == mode

    def test_no_weight_for_the_prompt(self):
        made = plan(WHOLE, guidance=0.0)
        assert made.settings.guidance == 0.0
        assert made.guides

    def test_blocks_of_the_model(self):
        causal = dataclasses.replace(WAN, causal_block=2)
        assert untyped(plan(model=causal, frames=13).settings).block == 2
        assert plan(model=causal, frames=13, block=2).config.block == 2
        with pytest.raises(UserError, match="block is 3, but the model was trained on blocks of 2"):
            plan(model=causal, frames=13, block=3)
        assert untyped(plan(block=7).settings).block == 7

    def test_few_steps_on_a_bidirectional_model(self):
        assert plan(WHOLE, sampler="few-step").settings == Windows(sampler="few-step", steps=4)

    def test_long_videos_roll(self):
        made = plan(frames=1 + 4 * 59, sink_frames=3)
        assert made.latents[0] == 60
        assert (made.settings.window, untyped(made.settings).sink_frames) == (21, 3)
        assert plan(frames=81).settings.window is None

    def test_attention(self):
        stored = dataclasses.replace(WAN, attention=MonarchAttention(tile=(3, 30, 52)))
        assert plan(model=stored).attention == MonarchAttention(tile=(3, 30, 52))
        assert plan(model=stored, attention="dense").attention == DenseAttention()
        assert plan(tile=(1, 30, 52)).attention == MonarchAttention(tile=(1, 30, 52))
        assert plan(attention="monarch").attention == MonarchAttention()
        assert plan(model=stored, compare_dense=True).attention == MonarchAttention(tile=(3, 30, 52))

    @pytest.mark.parametrize(
        "text", ["radial(keep=0.15)", "first_steps(1, dense, radial(keep=0.15))", "sliding_tile(tile=(7,5,4))"]
    )
    def test_masks_are_those_of_the_whole_clip(self, text):
        """3 frames alone could not keep so little, and their 7 frames of a tile lie in no block."""
        assert plan(attention=text).attention == parse(text)

    def test_a_stored_plan_makes_the_same_plan(self, tmp_path):
        made = plan(prompt="a cat", tile=(3, 30, 52), seed=5, frames=1 + 4 * 29, sink_frames=3)
        again = from_stored(made.config.stored(), source=tmp_path)
        assert make_plan(again, defaults=WHOLE, model=WAN).settings == made.settings
        assert again.tile == (3, 30, 52)
        assert again.stored() == made.config.stored()

    def test_wans_negative_prompt(self):
        import hashlib

        digest = hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()
        assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
        assert len(NEGATIVE_PROMPT) == 137


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (dict(height=481), "height is 481, which is not a multiple of 16; the nearest that are: 480 or 496"),
            (dict(width=8), "width is 8, which is not a multiple of 16; the nearest that are: 16"),
            (
                dict(frames=80),
                r"frames is 80; it must be 1 \+ 4 k and make whole blocks of 3 latent .* nearest: 69 or 81",
            ),
            (dict(frames=85), "frames is 85; .*; the nearest: 81 or 93"),
            (dict(frames=81, independent_first_frame=True), "after the first one whole blocks .* nearest: 73 or 85"),
            (dict(frames=2), "the nearest: 9"),
            (dict(tile=(1, 7, 52)), r"tile=\(1, 7, 52\): 7 does not divide the 30 rows"),
            (dict(tile=(2, 30, 52)), r"tile=\(2, 30, 52\): 2 does not divide the 3 frames"),
            (
                dict(tile=(3, 30, 52), independent_first_frame=True, frames=85),
                r"tile=\(3, 30, 52\): 3 does not divide the 1 frames",
            ),
            (
                dict(window=3, sink_frames=3, frames=93),
                "window=3 frames has no room for a block of 3 and sink_frames=3",
            ),
            (
                dict(window=12, sink_frames=2, frames=93, tile=(3, 30, 52)),
                "sink_frames=2 is not a multiple of the tile's 3 frames, below frames=12",
            ),
            (dict(num_iters=3), "num_iters is 3, which goes with a tile or with attention monarch; .* 'stored'"),
            (dict(attention="dense", implementation="xla"), "implementation is 'xla', which goes with a tile"),
            (dict(zoom=40), "zoom is 40: the file would have 19200 x 33280 pixels, .* use at most 19"),
            (dict(zoom=10, compare_dense=True), "4800 x 16640 pixels, .* use at most 9"),
            (dict(compare_dense=True), "compare_dense compares another attention with dense, .*; give a --tile"),
            (dict(attention="radial(keep=0.01)"), r"out of reach on 21 frames of 1560 tokens; the least is 0.0930"),
            (dict(attention="vsa(cube=(4,4,4))"), r"cube=\(4, 4, 4\) does not lie in one causal block of 3 frames"),
            (dict(attention="svg(rows=(0,4680))"), "has one past the 4680 queries of a call; use 0 to 4679"),
            (dict(compare_dense=True, attention="dense"), "compare_dense compares another attention with dense"),
            (dict(width=16400), "height x width is 480 x 16400; the file takes at most 16384"),
            (dict(mode="windows", window=1), "use a window of at least 2"),
            (dict(mode="windows", window=1025), "window is 1025; it must be at most 1024 latent frames"),
            (dict(frames=9, window=10**50), r"window is 1000000.*\.\.\.; it must be at most 1000000"),
            (
                dict(mode="bidirectional", frames=4097),
                "frames is 4097; at once it must be at most 4093; for longer ones",
            ),
            (
                dict(mode="bidirectional", window=6),
                "window is 6, for mode autoregressive or windows, .*; leave it out$",
            ),
            (
                dict(mode="windows", window=6, sink_frames=3),
                "sink_frames is 3, for mode autoregressive, .*; leave it out$",
            ),
            (dict(context=2), "context is 2, for mode windows, but mode is autoregressive; use 1"),
            (dict(mode="bidirectional", block=7), "block is 7, for mode autoregressive, but .*; leave it out$"),
            (dict(mode="bidirectional", independent_first_frame=True), "independent_first_frame is .*; leave it out$"),
            (dict(condition_frames=9), "condition_frames is 9, but there is no --condition; leave it out"),
            (dict(condition_frames=9, condition="None"), "condition_frames is 9, but there is no --condition"),
            (dict(mode="windows"), "mode is 'windows', but there is no window"),
            (
                dict(mode="bidirectional", unroll_layers="yes"),
                "unroll_layers is yes, for mode autoregressive, but mode is bidirectional; use auto",
            ),
            (
                dict(compare_dense=True, tile=(3, 30, 52), unroll_layers="yes"),
                "compare_dense is True, which needs layers in their stack, but unroll_layers is yes; use auto",
            ),
        ],
    )
    def test_autoregressive(self, given, message):
        with pytest.raises(UserError, match=message):
            plan(**given)

    @pytest.mark.parametrize(
        ("given", "advice"),
        [
            (dict(tile=(2, 30, 52)), "; give block 2, or another tile$"),  # the frames follow
            (dict(tile=(2, 30, 52), frames=81), "; give block 2 and frames 77, or another tile$"),
            (dict(tile=(2, 30, 52), frames=45), "; give block 2, or another tile$"),  # 12 latents are whole blocks
            (dict(tile=(3, 30, 52), window=20), "20 frames of grid.*; give window 18, or another tile$"),
            (dict(tile=(3, 30, 52), window=7, sink_frames=4), "; give window 9, or another tile$"),
            (dict(tile=(4, 30, 52), window=99), "; give block 4 and window 96, or another tile$"),
            (dict(tile=(2, 30, 52), window=5, sink_frames=2), "; give block 2 and window 4, or another tile$"),
            (
                dict(tile=(4, 30, 52), mode="windows", window=99),
                "99 frames of grid.*; give window 96, or another tile$",
            ),
            (dict(tile=(4, 30, 52), mode="windows", window=3), "; give window 4, or another tile$"),
            (dict(tile=(4, 30, 52), mode="windows", window=6, context=4), "; give window 8, or another tile$"),
        ],
    )
    def test_sizes_for_a_tile(self, given, advice):
        with pytest.raises(UserError, match=advice):
            plan(**given)

    def test_frames_that_nobody_gave_make_whole_blocks(self):
        assert plan(block=2).config.frames == 77
        assert plan(block=7).config.frames == 81

    def test_blocks_of_frames_that_are_latents(self):
        config = GenerateConfig(frames=31, height=32, width=32)
        with pytest.raises(UserError, match=r"frames is 31; it must make whole blocks of 3 .* nearest: 30"):
            make_plan(config, defaults=CAUSAL, model=WAN, spatial=8, temporal=1)

    def test_bidirectional_needs_no_blocks(self):
        assert plan(WHOLE, frames=85).latents[0] == 22
        with pytest.raises(UserError, match=r"frames is 84; it must be 1 \+ 4 k; the nearest: 81 or 85"):
            plan(WHOLE, frames=84)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (dict(prompt="  "), "prompt is empty"),
            (dict(frames=0), "frames is 0; it must be at least 1"),
            (dict(frames=10**12), "frames is 1000000000000; it must be at most 1000000"),
            (dict(steps=10**15), "steps is 1000000000000000; it must be at most 10000"),
            (dict(steps=(10**400,)), "it must be at most 10000"),
            (dict(fps=0.0), r"fps is 0\.0; it must be at least 0\.1"),
            (dict(seed=-1), "seed is -1"),
            (dict(quality=60), "quality is 60"),
            (dict(shift=1e-30), r"shift is 1e-30; it must be at least 0\.001"),
            (dict(shift=1e30), r"shift is 1e\+30; it must be at most 1000"),
            (dict(guidance=1e38), r"guidance is 1e\+38; it must be at most 1000"),
            (dict(tile=(1, 2, 3), attention="dense"), "leave one of them out"),
        ],
    )
    def test_settings(self, given, message):
        with pytest.raises(UserError, match=message):
            GenerateConfig(**given)

    def test_image_to_video_models(self):
        with pytest.raises(UserError, match=r"can be sampled: take one, such as Wan-AI/Wan2\.1-T2V"):
            plan(model=wan_config("wan2.1-i2v-14b"))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("frames", "9"),
            ("frames", True),
            ("seed", None),
            ("seed", 1.5),
            ("mode", "forwards"),
            ("tile", [1, 2]),
            ("tile", 7),
            ("condition", 4),
            ("components", 4),
            ("independent_first_frame", "no"),
        ],
    )
    def test_edited_settings(self, tmp_path, name, value):
        with pytest.raises(UserError, match=f"has {name}=.* in its settings, which is not one that"):
            from_stored(GenerateConfig().stored() | {name: value}, source=tmp_path)

    def test_settings_of_another_version(self, tmp_path):
        with pytest.raises(UserError, match="another version: it has the settings colour"):
            from_stored({"colour": 1}, source=tmp_path)

    @pytest.mark.parametrize(
        "values",
        [
            {f"name{n}": 1 for n in range(10_000)},
            {"x" * 10_000: 1},
            {"seed": "x" * 10_000},
            {"seed": [1] * 10_000},
            {"attention": "x" * 10_000},
            {"attention": "dense", "blocks": "x" * 10_000},
            {"sampler": "few-step", "steps": [1000, *range(1000)]},
            {"sampler": "euler", "steps": list(range(1000, 0, -1))},
        ],
    )
    def test_what_is_long_is_said_in_short(self, values):
        """Whoever wrote the file."""
        with pytest.raises(UserError) as said:
            make_plan(from_stored(values, source=Path("video.mp4")), defaults=CAUSAL, model=WAN)
        assert len(str(said.value)) < 700


class TestBeginning:
    def test_a_clip(self):
        made = plan()
        assert made.begins_with(9) == 3
        assert made.begins_with(21) == 6
        for frames in (8, 13, 1):
            with pytest.raises(UserError, match=f"condition has {frames} frames, .*9, 21, 33"):
                made.begins_with(frames)
        with pytest.raises(UserError, match="which leaves none of frames=81 to generate"):
            made.begins_with(81)

    def test_an_image(self):
        with pytest.raises(UserError, match="a single image needs independent_first_frame"):
            plan().begins_with(1)
        assert plan(independent_first_frame=True, frames=85).begins_with(1) == 1
