"""The settings of a run's data. Does not import JAX."""

from dataclasses import dataclass
from pathlib import Path

from monarchrt.models.errors import require

LARGEST = 8192  # pixels, for height and width


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data: windows of clips, a folder of precomputed latents, or prompts alone."""

    video: Path | None = None
    """A video file, or a folder of them. Frames are read once, resized to cover height x width, center-cropped and cut
    into windows; the last clips of a folder are held out entirely."""

    latents: Path | None = None
    """Instead of a video: a folder of .safetensors files, each with `latents` [F, H, W, C] and `text` [L, D]; or one of
    Self-Forcing's LMDBs (its folder, its file, or the folder of its parts), with `components`."""

    prompts: Path | None = None
    """Instead of either, for dmd and self-forcing, which need no clips: a text file with one prompt per line. frames,
    height and width are then those of a video, 4 k + 1 and multiples of 16, such as 81 480 832."""

    components: Path | None = None
    """Folder or Hugging Face repository with VAE, text encoder and tokenizer; for prompts and for the captions of an
    LMDB, which are encoded once before the run starts, and for `sample_every`, whose latents the VAE decodes."""

    text_cache: Path | None = None
    """Folder for the embeddings of these texts. Default: next to their file, with .texts appended to its name."""

    rows: int = 512
    """Tokens of a text embedding; longer texts are truncated."""

    frames: int = 9
    """Frames in one training window."""

    height: int = 64
    """Height of a frame in pixels; a multiple of the patch."""

    width: int = 112
    """Width of a frame in pixels; a multiple of the patch."""

    fps: float = 0.0
    """Frames per second at which to read a video, by its timestamps, such as 16. 0: the frames as stored, independent
    of their timestamps."""

    stride: int = 1
    """Take every n-th of these frames."""

    patch: int = 8
    """Side of the pixel blocks that become one latent position with 3*patch*patch channels (an orthonormal cosine
    transform; there is no VAE)."""

    whitening: float = 0.5
    """From 0 (latents of the orthonormal transform) to 1 (every channel scaled to about unit variance for natural
    images)."""

    held_out: float = 0.2
    """Fraction of the frames (or of a folder's files) at the end that is never trained on."""

    gap: int = 4
    """Frames left out between the training part and the held-out part of a clip."""

    crop: float = 1.0
    """Read the video larger than height x width by this factor and train on random crops; 1 turns this off. Held-out
    windows are always center-cropped."""

    flip: bool = False
    """Mirror half of the training windows left to right."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_texts()
        self._check_sizes()
        self._check_unused()

    def _check_numbers(self) -> None:
        """Checks the range of each number by itself."""
        require(self.frames >= 1, f"frames is {self.frames}; it must be at least 1")
        require(self.stride >= 1, f"stride is {self.stride}; it must be at least 1")
        require(
            self.fps == 0 or 0.1 <= self.fps <= 1000,
            f"fps is {self.fps}; it must lie in [0.1, 1000], for example 16, or be 0 for the frames that are stored",
        )
        require(self.gap >= 0, f"gap is {self.gap}; it must be at least 0")
        require(self.patch >= 1, f"patch is {self.patch}; it must be at least 1, for example 4 or 8")
        require(self.rows >= 1, f"rows is {self.rows}; it must be at least 1, for example 512")
        require(0 < self.held_out < 1, f"held_out is {self.held_out}; it must lie between 0 and 1, for example 0.2")
        require(0 <= self.whitening <= 1, f"whitening is {self.whitening}; it must lie in [0, 1]")
        require(1 <= self.crop <= 4, f"crop is {self.crop}; it must lie in [1, 4]")

    def _check_texts(self) -> None:
        """Checks `prompts`, which stand for data, and the settings of texts."""
        require(
            self.prompts is None or (self.video is None and self.latents is None),
            f"both prompts and {'video' if self.video is not None else 'latents'} were given; give one",
        )
        if self.prompts is not None:
            near = (1 + 4 * max(0, round((self.frames - 1) / 4)), *(16 * max(1, round(n / 16)) for n in self.size))
            require(
                (self.frames, *self.size) == near,
                f"frames, height and width are {self.frames}, {self.height} and {self.width}; with prompts they must "
                f"be 1 + 4 k and multiples of 16, for example {' '.join(map(str, near))}",
            )
        for name in ("components", "text_cache", "rows"):
            require(
                self.prompts is not None
                or self.latents is not None
                or getattr(self, name) == getattr(type(self), name),
                f"{name} is {getattr(self, name)}, which is for texts, but a video has none here; leave it out",
            )

    def _check_sizes(self) -> None:
        """Checks height and width in pixels."""
        for name in ("height", "width"):
            size = getattr(self, name)
            require(size <= LARGEST, f"{name} is {size}; it must be at most {LARGEST}")
            require(
                size >= self.patch and size % self.patch == 0,
                f"{name} is {size}, which is not a positive multiple of patch {self.patch}; "
                f"the nearest that is: {max(1, round(size / self.patch)) * self.patch}",
            )

    def _check_unused(self) -> None:
        """Checks that settings of videos are left out if there is none."""
        for name in ("frames", "height", "width", "fps", "stride", "patch", "whitening", "gap", "crop", "flip"):
            value = getattr(self, name)
            require(
                self.latents is None or self.video is not None or value == getattr(type(self), name),
                f"{name} is {value}, but latents are taken as they are in {self.latents}; leave {name} out",
            )
        for name in ("fps", "stride", "patch", "whitening", "gap", "crop", "flip"):
            value = getattr(self, name)
            require(
                self.prompts is None or value == getattr(type(self), name),
                f"{name} is {value}, which is for videos, but prompts have none; leave {name} out",
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def precomputed(self) -> Path | None:
        """The folder of latents or the file of prompts; None if the data are videos."""
        return self.latents or self.prompts
