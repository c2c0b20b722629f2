"""`monarchrt tune` where there is no GPU: what it refuses, and its check of the numbers."""

import jax
import pytest

import monarch_jax
from monarchrt.models.errors import UserError
from monarchrt.train import cli
from monarchrt.train.cli.tune import TuneConfig, check
from monarchrt.triton_kernels.config import Target, heuristic

SMALL = TuneConfig(grid=(2, 4, 5), tile=(1, 4, 5), dim=16)
CONFIGS = heuristic(Target(90), b1=4, b2=5, dim=16, itemsize=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--grid 21 30 52 --tile 1 30 51", "51 does not divide the 52 columns"),
        ("--grid 21 30 52 --tile 1 30 52 --query-frames 22", "query_frames=22 is more than the 21 frames of grid"),
        ("--grid 21 30 52 --tile 1 30 52 --heads 0", "heads is 0; it must be at least 1"),
        ("--grid 21 30 52 --tile 1 30 52 --query-frames -3", "query_frames is -3; it must be at least 1"),
        ("--grid 21 30 52 --tile 1 30 52 --dim 129", "dim is 129; the Triton kernels take at most 128"),
        (
            "--grid 21 30 52 --tile 1 3 52",
            "tile (1, 3, 52) has 3 rows (frames x height) of 52; the Triton kernels need 4",
        ),
        ("--grid 21 30 52 --tile 1 30 2", "tile (1, 30, 2) has 30 rows"),
        pytest.param(
            "--grid 21 30 52 --tile 1 30 52",
            "tune measures on a GPU, and JAX's default backend here is 'cpu'",
            marks=pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU"),
        ),
    ],
)
def test_refuses(options, message, capsys):
    assert cli.main(["tune", *options.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1


def stand_in(monkeypatch, change):
    """Another backend, with its output changed, where the kernels would run."""
    real = monarch_jax.monarch_attention

    def attention(*arrays, implementation, **options):
        if implementation == "reference":
            return real(*arrays, implementation=implementation, **options)
        return real(*arrays, implementation="xla", **options) * change

    monkeypatch.setattr(monarch_jax, "monarch_attention", attention)


def test_right_numbers_pass(monkeypatch):
    stand_in(monkeypatch, 1)
    check(SMALL, CONFIGS)


@pytest.mark.parametrize("change", [1.1, float("nan")])
def test_wrong_numbers_do_not(monkeypatch, change):
    stand_in(monkeypatch, change)
    with pytest.raises(UserError, match=r"output is off by .* from the reference, more than 1e-02"):
        check(SMALL, CONFIGS)


def test_a_shape_that_the_kernels_do_not_serve():
    with pytest.raises(UserError, match="implementation='triton' cannot run this call"):
        check(TuneConfig(grid=(2, 3, 5), tile=(1, 3, 5)), CONFIGS)
