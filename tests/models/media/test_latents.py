import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.media.latents import PatchDCT


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_inverse_to_float32_rounding(video, patch, whitening):
    transform = PatchDCT(patch=patch, whitening=whitening)
    pixels = video.astype(np.float32) / 127.5 - 1
    latents = transform.encode_float(pixels)
    assert latents.shape == (3, 16 // patch, 24 // patch, transform.channels)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(transform.decode_float(latents), pixels, atol=4e-6)
    np.testing.assert_array_equal(transform.decode(transform.encode(video)), video)


def test_orthonormal_without_whitening(video):
    transform = PatchDCT(patch=8)
    noise = np.random.default_rng(1).standard_normal((2, 16, 24, 3)).astype(np.float32)
    assert np.square(transform.encode_float(noise)).sum() == pytest.approx(np.square(noise).sum(), rel=1e-5)


def test_a_grey_block_is_its_mean_brightness_and_nothing_else():
    grey = np.full((1, 8, 8, 3), 191, np.uint8)
    latents = PatchDCT(patch=8).encode(grey)[0, 0, 0]
    assert latents[0] == pytest.approx((191 / 127.5 - 1) * 8 * np.sqrt(3), rel=1e-5)
    np.testing.assert_allclose(latents[1:], 0, atol=1e-5)


def test_channels_are_colour_then_vertical_then_horizontal_frequency():
    ramp = np.broadcast_to(np.linspace(-1, 1, 4, dtype=np.float32)[:, None, None], (4, 4, 3)).copy()[None]
    latents = PatchDCT(patch=4).encode_float(ramp)[0, 0, 0].reshape(3, 4, 4)
    assert abs(latents[0, 1, 0]) > 1  # brightness, vertical frequency 1
    assert np.abs(latents[0, :, 1:]).max() < 1e-6
    assert np.abs(latents[1:]).max() < 1e-6


def test_whitening_evens_out_the_variance_of_smooth_pictures():
    y, x = np.mgrid[:64, :64] / 64
    rng = np.random.default_rng(2)
    waves = [np.cos(2 * np.pi * (rng.normal(0, 2) * x + rng.normal(0, 2) * y) + rng.random() * 6) for _ in range(90)]
    smooth = np.stack(waves).reshape(30, 3, 64, 64).transpose(0, 2, 3, 1).astype(np.float32) * 0.5

    def spread(whitening):
        std = PatchDCT(patch=4, whitening=whitening).encode_float(smooth).std((0, 1, 2))
        return std.max() / std[std > 0].min()

    assert spread(1.0) < spread(0.5) < spread(0.0)


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"18 x 24 .* patch 4; crop it to 16 x 24"):
        PatchDCT(patch=4).encode(np.zeros((1, 18, 24, 3), np.uint8))


def test_decoding_clips_and_survives_nan():
    latents = np.full((1, 1, 1, 48), np.nan, np.float32)
    assert PatchDCT(patch=4).decode(latents).dtype == np.uint8
    assert PatchDCT(patch=4).decode(np.full((1, 1, 1, 48), 1e6, np.float32)).max() == 255
