"""Distances between sets of videos in the features of a network."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.files import growing
from monarchrt.models.media.windows import read_videos
from monarchrt.train.evaluation.distances import frechet_distance, kernel_distance
from monarchrt.train.evaluation.features import FeatureNetwork


class Sets(NamedTuple):
    """The features to compute, and their number.

    Attributes:
        network: The network that computes features.
        depth: Depth in the network.
        videos: Number of videos of each setting.
        frames: Number of frames of each video.
    """

    network: FeatureNetwork
    depth: int
    videos: int
    frames: int

    @property
    def name(self) -> str:
        """The network and its number of channels, such as lite0_112."""
        return f"{self.network.name}_{self.network.widths[self.depth]}"


def plan_sets(network: FeatureNetwork, *, videos: int, frames: int) -> Sets:
    """Chooses the last depth with fewer channels than there will be frames, so that covariances are not singular.

    Args:
        network: The feature network.
        videos: Number of videos of each setting.
        frames: Number of frames of each video.

    Raises:
        UserError: If there are fewer than two videos, or too few frames for every depth.
    """
    if videos < 2:
        raise UserError(
            "features: distances are between sets of videos, and each setting makes 1; give two --seeds at least, "
            "better many more"
        )
    depth = network.depth(videos * frames)
    if depth is None:
        least = min(network.widths)
        raise UserError(
            f"features: {videos} videos of {frames} frames are {videos * frames} frames, and the covariance of the "
            f"{least} channels of {network.name}'s first depth needs more than {least}; make {least // frames + 1} "
            f"videos or more, with --seeds"
        )
    return Sets(network, depth, videos, frames)


def features_of(sets: Sets, frames: UInt8[np.ndarray, "t h w 3"], path: Path) -> list[np.ndarray]:
    """Features of a video at each depth, read from its file, or computed and written."""
    if path.is_file():
        with np.load(path) as stored:
            return [stored[str(depth)] for depth in range(len(sets.network.widths))]
    found = sets.network(frames)
    with growing(path) as part:
        with part.open("wb") as file:
            np.savez(file, **{str(depth): x for depth, x in enumerate(found)})  # pyright: ignore[reportArgumentType]
        os.replace(part, path)
    return found


def real_windows(real: Path, sets: Sets, *, height: int, width: int) -> list[UInt8[np.ndarray, "t h w 3"]]:
    """Cuts real videos into consecutive clips as long as the generated ones; remaining frames are left out.

    Args:
        real: A video, or a folder of videos.
        sets: The features, with the number of frames of a clip.
        height: Height of the clips in pixels.
        width: Width of the clips in pixels.

    Raises:
        UserError: If a video cannot be read, there are fewer than two clips, or too few frames for the channels.
    """
    read = read_videos(real, height=height, width=width, stride=1, fps=0.0, window=sets.frames)
    starts = np.cumsum([0, *read.lengths[:-1]])
    clips = [
        read.frames[at + n * sets.frames : at + (n + 1) * sets.frames]
        for at, length in zip(starts, read.lengths, strict=True)
        for n in range(length // sets.frames)
    ]
    width_of = sets.network.widths[sets.depth]
    least = max(2, width_of // sets.frames + 1)
    if len(clips) < least:
        raise UserError(
            f"real {real} makes {len(clips)} clips of {sets.frames} frames, and distances in {sets.name} need {least}; "
            f"give more or longer videos, or fewer --seeds, which take fewer channels"
        )
    return clips


def distances(
    made: list[list[np.ndarray]], other: list[list[np.ndarray]], sets: Sets, *, paired: bool
) -> dict[str, float]:
    """Distances of the features of frames, and of their differences between consecutive frames.

    Args:
        made: Features of each video at each depth, [T, width].
        other: Features of the videos to compare with.
        sets: Network and depth of the features.
        paired: Whether videos with the same index in both were generated from the same noise, and are dependent.

    Returns:
        `frechet_NAME` and `kernel_NAME`, and for differences `frechet_NAME_change` and `kernel_NAME_change`, as far as
        there are enough frames.
    """
    values = {}
    for suffix, order in (("", 0), ("_change", 1)):
        both, groups = [], []
        for number, videos in enumerate((made, other)):
            parts = [np.diff(np.asarray(video[sets.depth], np.float64), order, axis=0) for video in videos]
            first = 0 if paired or not number else len(made)
            both.append(np.concatenate(parts))
            groups.append(np.repeat(np.arange(len(parts)) + first, [len(part) for part in parts]))
        if min(map(len, both)) > both[0].shape[1]:
            values[f"frechet_{sets.name}{suffix}"] = frechet_distance(*both)
        if min(map(len, both)):
            values[f"kernel_{sets.name}{suffix}"] = kernel_distance(*both, x_groups=groups[0], y_groups=groups[1])
    return values
