"""Opens the source that the settings of the data name."""

from pathlib import Path

from monarchrt.models.errors import UserError
from monarchrt.models.media.windows import read_videos
from monarchrt.train.data import ClipWindows, LatentFolder, Source
from monarchrt.train.data_settings import DataConfig
from monarchrt.train.latent_lmdb import LatentLMDB, shards
from monarchrt.train.texts import PromptFile


def open_source(
    config: DataConfig, *, text_shape: tuple[int, int] = (1, 1), digests: Path | None = None, encode: bool = True
) -> Source:
    """Opens the data that a config names.

    Args:
        config: Settings of the data; exactly one of `video`, `latents` and `prompts` must be set.
        text_shape: Shape (L, D) of the text embeddings of a video, which are zero.
        digests: File with digests of an earlier start, as for `LatentFolder`.
        encode: Whether to encode texts that are not encoded yet, and write their embeddings to files; otherwise the
            embeddings of prompts and captions are zero.

    Returns:
        The source.

    Raises:
        UserError: If none or several are set, or the data cannot be used.
    """
    unread = None if encode else text_shape[1]
    if config.prompts is not None:
        return PromptFile(config, unread=unread)
    if (config.video is None) == (config.latents is None):
        given = "neither was" if config.video is None else "both were"
        raise UserError(f"{given} given; give either video (--video CLIP.mp4) or latents (--latents FOLDER)")
    if config.latents is not None:
        if shards(config.latents):
            return LatentLMDB(config.latents, config, unread=unread)
        return LatentFolder(config.latents, config, digests=digests)
    video = Path(config.video or "")
    frames, lengths = read_videos(
        video,
        height=round(config.height * config.crop),
        width=round(config.width * config.crop),
        stride=config.stride,
        fps=config.fps,
        window=config.frames,
    )
    return ClipWindows(frames, config, text_shape=text_shape, name=f"video {video}", lengths=lengths)
