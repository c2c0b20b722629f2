"""What `monarchrt bench generate` says of the time, by hand-made arrivals and of a tiny engine."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.serve.bench import Samples, cadence, measure, percentiles, summarize, take_samples
from tests.models.serve.conftest import encode
from tests.untyped import there


def test_play_that_never_waits():
    seen = cadence([0.5, 0.9, 1.4, 1.9], [12, 12, 12, 12], fps=16.0)  # a block is 0.75 s of play
    assert (seen.first, seen.deadlines_met, seen.underruns, seen.stood) == (0.5, 1.0, 0, 0)
    assert seen.gap_ms["p50"] == 500.0


def test_play_that_stands_still():
    """Due at 1.5, 2.5 and, after standing still for 0.7 s, at 4.2: the last comes in time again."""
    seen = cadence([0.5, 1.0, 3.2, 4.1], [16, 16, 16, 16], fps=16.0)
    assert (seen.deadlines_met, seen.underruns) == (pytest.approx(2 / 3), 1)
    assert seen.stood == pytest.approx(0.7)


def test_percentiles():
    assert percentiles([0.001 * n for n in range(1, 102)]) == {"p50": 51.0, "p90": 91.0, "p99": 100.0}


def test_an_engine(engine):
    found = measure(engine, blocks=6, fps=8.0)
    assert json.loads(json.dumps(found)) == found
    assert (found["height"], found["width"], found["blocks"], found["frames"]) == (8, 16, 6, 18)
    assert found["steady"]["compiled"] == 0
    for stage in ("block", "text", "network", "decoder", "jpeg", "mp4"):
        assert set(found["steady"][f"{stage}_ms"]) == {"p50", "p90", "p99"}
    assert found["memory"]["host_peak"] > 2**20
    assert {"device", "driver", "commit", "cores"} < set(found)
    assert found["nice"] == os.nice(0)
    assert set(found["cold"]) == {"text", "first_frames"}
    assert set(found["cadence"]) == {"fps", "first", "gap_ms", "deadlines_met", "underruns", "stood"}
    assert found["cadence"]["fps"] == 8.0
    assert {"monarchrt", "jax", "jaxlib"} < set(found["versions"])


def test_blocks_at_the_speed_of_playback(engine, monkeypatch):
    """Each waits until its first frame is due, counted from the video's begin, not from the block before."""
    samples, naps = Samples(), []
    monkeypatch.setattr("monarchrt.models.serve.bench.time.sleep", naps.append)
    take_samples(engine, samples, blocks=4, pace=0.01)
    assert naps == pytest.approx([engine.frames(block) / 0.01 for block in range(4)], abs=60)
    assert naps[1] > 100
    found = summarize(engine, samples, fps=0.01)["paced"]
    assert {"network_ms", "decoder_ms"} < set(found)
    assert found["network_ms"]["p50"] == pytest.approx(1e3 * float(np.median(samples.paced["network"][2:])), abs=1e-3)
    assert "paced" not in summarize(engine, Samples(), fps=8.0)


def test_one_that_is_stopped_keeps_what_it_has(engine, monkeypatch):
    """In the fifth block of the stream, while the fourth is fetched only after it was begun."""
    samples, decode, calls = Samples(), engine.decode, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3 + 5:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(engine, "decode", stopped)
    with pytest.raises(KeyboardInterrupt):
        take_samples(engine, samples, blocks=9)
    found = summarize(engine, samples, fps=8.0)
    assert json.loads(json.dumps(found)) == found
    assert (found["blocks"], found["frames"]) == (4, 12)
    assert found["cold"]["first_frames"] == there(samples.text) + samples.cold[0]
    assert set(found["steady"]) == {"first_frames", "block_ms", "p99_over_p50", "frames_per_second", "compiled"}
    assert found["cadence"]["deadlines_met"] <= 1
    two = summarize(engine, Samples(arrivals=[0.5, 1.0], frames=[9, 12]), fps=8.0)  # the second is still the start
    assert set(two["steady"]) == {"first_frames", "frames_per_second", "compiled"}
    assert two["cadence"]["underruns"] == 0
    empty = summarize(engine, Samples(), fps=8.0)
    assert (empty["blocks"], empty["cold"], empty["steady"], empty["cadence"]) == (0, {}, {}, {"fps": 8.0})


def test_frames_are_copied_before_anyone_waits(engine, monkeypatch):
    """Of each block of a stream, as they are in generation."""
    copied, copy = [], type(jnp.zeros(())).copy_to_host_async

    def noted(array):
        copied.append(array.shape)
        copy(array)

    monkeypatch.setattr("monarchrt.models.generate.decoders.on_cpu", lambda array: False)  # as on a GPU
    monkeypatch.setattr(type(jnp.zeros(())), "copy_to_host_async", noted)
    measure(engine, blocks=4)
    assert copied == [(1, 3, 8, 16, 3)] * (3 + 4)


def test_the_prompt_is_one_that_the_engine_knows(engine, monkeypatch):
    """Of a file of embeddings there is no other."""

    def stored(prompts):
        assert set(prompts) == {engine.sample}
        return encode(prompts)

    monkeypatch.setattr(engine, "_encode", stored)
    engine._texts.clear()
    assert measure(engine, blocks=4)["steady"]["compiled"] == 0
