"""Collectives as XLA writes them: what one begins with, and what it ends with."""

import pytest

from monarchrt.models.collectives import collectives

PROGRAM = """
ENTRY %main (p: f32[8]) -> f32[8] {{
  ROOT %x = {} {}(%p), channel_id=1
}}
"""


@pytest.mark.parametrize(
    ("shape", "name", "shapes", "size"),
    [
        ("f32[8]{0}", "all-reduce", ((8,),), 32),
        ("((bf16[8]{0}), bf16[8]{0})", "all-reduce-start", ((8,),), 16),
        ("((bf16[8]{0}, f32[2,3]{1,0:S(1)}), (bf16[8]{0}, f32[2,3]{1,0}))", "all-reduce-start", ((8,), (2, 3)), 40),
        ("(bf16[8]{0}, f32[2,3]{1,0})", "all-reduce-start", ((8,), (2, 3)), 40),
        ("(bf16[8]{0}, bf16[16]{0})", "all-gather-start", ((16,),), 32),
        ("((bf16[8]{0}), bf16[16]{0})", "all-gather-start", ((16,),), 32),
        ("((bf16[8]{0}, bf16[2]{0}), (bf16[16]{0}, bf16[4]{0}))", "all-gather-start", ((16,), (4,)), 40),
    ],
)
def test_results_are_counted_once(shape, name, shapes, size):
    [found] = collectives(PROGRAM.format(shape, name))
    assert (found.shapes, found.bytes, found.times, found.loops) == (shapes, size, 1, 0)
