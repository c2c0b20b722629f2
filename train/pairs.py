"""`monarchrt pairs`: writes states along a teacher's ODE trajectories, and their ends, for ODE regression."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, write_arrays
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.files import locked, remove_abandoned
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.train.config import DataConfig
from monarchrt.train.data import LatentFolder
from monarchrt.train.objectives.settings import check_shift, check_steps
from monarchrt.train.pair_folder import Made

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from monarchrt.models.sampling import SamplerTable
    from monarchrt.models.sampling.solve import Flow

type Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Follow a teacher from noise to data and save the states at a student's steps, for `--objective ode`."""

    checkpoint: str | None = None
    """The teacher: a run folder, a Wan checkpoint, or the name of one on Hugging Face."""

    latents: Path | None = None
    """A folder of .safetensors files as for `train --latents`, of which only sizes and texts are used."""

    embeddings: Path | None = None
    """Instead: a file of text embeddings from `generate --save-embeddings`. A run that was trained on a clip needs
    neither."""

    negative: Path | None = None
    """File with the embedding of the negative prompt, for guidance."""

    out: Path = Path("pairs")
    """Folder for one .safetensors file per example. Existing files are kept, so a stopped run can continue; files made
    with other settings are refused."""

    count: int | None = None
    """Number of examples; texts are used in turn, each time with other noise. Default: one per text."""

    frames: int = 81
    """With embeddings: frames of a video, 4 k + 1."""

    height: int = 480
    """With embeddings: pixels, a multiple of 16."""

    width: int = 832
    """With embeddings: pixels, a multiple of 16."""

    student_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """The student's steps, as timesteps before the shift, at which states are saved, in addition to the end. Each must
    be one of the solver's."""

    solver: Literal["euler", "unipc", "dpm++"] = "euler"
    """The solver that follows the teacher."""

    steps: int = 48
    """Steps of the solver."""

    shift: float = 5.0
    """Timestep shift of the solver's noise levels. The student must be trained and sampled with the same."""

    guidance: float | None = None
    """Weight g of guidance, v_negative + g (v_text - v_negative). Default: 6 with `negative`; without it none."""

    batch: int = 1
    """Examples per call of the network."""

    seed: int = 0
    """Seed of the noise."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype of the teacher; auto is bf16 on a GPU."""

    store: Literal["fp16", "fp32"] = "fp16"
    """Dtype of the stored states; fp16 as in the published data."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", *(("count",) if self.count is not None else ())):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_shift(self.shift)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must lie in [0, 2**32)")  # JAX would wrap others around
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise UserError(f"guidance is {self.guidance}; it must be at least 0, for example 6.0; 1 turns it off")
        if self.guidance not in (None, 1.0) and self.negative is None:
            raise UserError(
                f"guidance is {self.guidance}, but there is no embedding of a negative prompt; give --negative FILE, "
                f"as generate --save-embeddings writes it, or leave guidance out"
            )
        if self.latents is not None and self.embeddings is not None:
            raise UserError("both latents and embeddings were given; give one")
        if self.frames % 4 != 1 or self.height % 16 or self.width % 16 or min(self.frames, self.height, self.width) < 1:
            raise UserError(
                f"frames, height and width are {self.frames}, {self.height} and {self.width}; they must be 1 + 4 k and "
                f"multiples of 16, for example 81 480 832"
            )
        self.stored()

    def stored(self) -> tuple[int, ...]:
        """Indices of the solver's steps whose states are saved.

        Examples:
            >>> PairsConfig(steps=48).stored()
            (0, 12, 24, 36)

        Raises:
            UserError: If the student's steps do not decrease, or one is not among the solver's.
        """
        steps = self.student_steps
        check_steps(steps)
        for step in steps:
            if (1000 - step) * self.steps % 1000:
                least = min(n for n in range(1, 1001) if all((1000 - s) * n % 1000 == 0 for s in steps))
                fitting = -(-self.steps // least) * least
                raise UserError(
                    f"steps is {self.steps}, and {step} of student_steps is none of them; give --steps {fitting}"
                )
        return tuple((1000 - step) * self.steps // 1000 for step in steps)

    def table(self) -> "SamplerTable":
        """The table of the solver's steps."""
        from monarchrt.models.sampling import sampler_table

        return sampler_table(self.solver, steps=self.steps, shift=self.shift)

    @property
    def weight(self) -> float:
        """Weight of the guidance; 1 for none."""
        return (6.0 if self.guidance is None else self.guidance) if self.negative is not None else 1.0


def trajectory(
    flow: "Flow",
    noise: "Float[Array, 'b f h w c']",
    table: "SamplerTable",
    *,
    stored: tuple[int, ...],
    numbered: bool = False,
) -> "tuple[Float[Array, 'n b f h w c'], Float[Array, 'b f h w c']]":
    """Runs a solver and returns its states at some of its steps, and its end.

    Examples:
        >>> import jax.numpy as jnp
        >>> from monarchrt.models.sampling import sampler_table
        >>> straight = lambda x, t: jnp.ones_like(x)
        >>> table = sampler_table("euler", steps=4, shift=1.0)
        >>> states, end = trajectory(straight, jnp.full((1, 1, 1, 1, 1), 3.0), table, stored=(0, 2))
        >>> states.ravel().tolist(), float(end.squeeze())
        ([3.0, 2.5], 2.0)

    Args:
        flow: (latents, timestep) -> flow.
        noise: Initial state.
        table: Steps of a deterministic solver.
        stored: Indices of the steps before which the state is saved.
        numbered: Whether `flow` has the index of the step as a third argument.

    Returns:
        The saved states, and the end.
    """
    import jax
    import jax.numpy as jnp

    from monarchrt.models.sampling.solve import SolverState, rows, solver_step

    kept = jnp.zeros((len(stored), *noise.shape), noise.dtype)
    places = jnp.asarray(stored)

    def step(carry: Any, xs: Any) -> Any:
        (state, kept), (row, number) = carry, xs
        here = (places == number).reshape(-1, *[1] * noise.ndim)
        kept = jnp.where(here, state.x[None], kept)
        where = (number,) if numbered else ()
        return (solver_step(state, row, flow(state.x, row.timesteps, *where)), kept), None

    begin = (SolverState.init(noise), kept)
    (state, kept), _ = jax.lax.scan(step, begin, (rows(table), jnp.arange(table.steps)))
    return kept, state.x


def follower(
    config: PairsConfig, graph: Any, shape: tuple[int, ...], *, negative: "np.ndarray | None" = None
) -> Callable[..., Any]:
    """Makes the compiled function that computes a teacher's trajectories.

    Args:
        config: Solver, guidance, and the seed; the noise of an example is a function of the seed and its number.
        graph: Structure of the teacher.
        shape: Shape (F, h, w, C) of an example's latents.
        negative: Embedding of the negative prompt; None for no guidance.

    Returns:
        (parameters, numbers of the examples [B], text [B, L, D]) -> states [n, B, F, h, w, C] and ends [B, F, h, w, C].
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from monarchrt.models.sampling import guided

    table = config.table()

    @jax.jit
    def follow(params: Any, numbers: Any, text: Any) -> Any:
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(config.seed), number))(numbers)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
        against = None if negative is None else jnp.broadcast_to(negative, (len(text), *negative.shape))
        flow = guided(nnx.merge(graph, params), text, against, guidance=config.weight)
        return trajectory(flow, noise, table, stored=config.stored(), numbered=True)

    return follow


def make_pairs(
    config: PairsConfig, *, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> list[Path]:
    """Writes a file for each example, atomically.

    Args:
        config: The settings.
        report: Called with lines of progress.

    Returns:
        The files, including those that already existed.

    Raises:
        UserError: If teacher, sizes and texts do not fit, before anything is computed; if an existing file was made
            with other settings; if states are NaN or infinite.
    """
    from flax import nnx

    from monarchrt.models.generate.load import open_checkpoint
    from monarchrt.models.sampling.rollout import check_size

    given = GenerateConfig(checkpoint=config.checkpoint, precision=config.precision)
    opened = open_checkpoint(given)
    sizes = opened.sizes
    size, texts = _examples(config, opened)
    negative = _negative(config)
    _check_teacher(config, sizes, text=texts[0], negative=negative)
    count = config.count or len(texts)
    table = config.table()
    made = Made(
        sigmas=tuple(float(table.sigmas[n]) for n in config.stored()), shift=config.shift, steps=config.steps,
        solver=config.solver, guidance=config.weight, teacher=str(config.checkpoint), seed=config.seed,
    )  # fmt: skip
    files = [config.out / f"{number:06d}.safetensors" for number in range(count)]
    todo = [number for number, path in enumerate(files) if not path.exists()]
    for path in files:
        if path.exists():
            _check_kept(path, made)
    if len(todo) < count:
        report(f"{count - len(todo)} of {count} examples are in {config.out} already")
    if not todo:
        return files
    shape = (*size, sizes.out_channels)
    model = nnx.eval_shape(lambda: _model(sizes))
    with user_input():
        check_size(model, (config.batch, *shape))
    config.out.mkdir(parents=True, exist_ok=True)
    graph, params = nnx.split(opened.network(given))
    follow = functools.partial(follower(config, graph, shape, negative=negative), params)

    with locked(config.out, name="out"):
        remove_abandoned(config.out)
        for start in range(0, len(todo), config.batch):
            numbers = todo[start : start + config.batch]
            chosen = [texts[number % len(texts)] for number in numbers]
            for number, arrays in zip(numbers, _followed(config, follow, numbers, chosen), strict=True):
                write_arrays(files[number], arrays, metadata=made.to_header())
            report(f"{start + len(numbers)}/{len(todo)} examples: {files[numbers[-1]]}")
    return files


def _check_teacher(config: PairsConfig, sizes: Any, *, text: np.ndarray, negative: np.ndarray | None) -> None:
    """Checks that the teacher takes the texts, and makes what it takes."""
    for name, x in (("text", text), ("negative", negative)):
        if x is not None and x.shape[-1] != sizes.text_dim:
            raise UserError(
                f"{name} is of width {x.shape[-1]}, but the teacher {config.checkpoint} takes {sizes.text_dim}"
            )
    if sizes.in_channels != sizes.out_channels:
        raise UserError(f"checkpoint {config.checkpoint} has {sizes.in_channels} input channels; give a t2v model")


def _followed(
    config: PairsConfig, follow: Callable[..., Any], numbers: list[int], texts: list[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of the examples with these numbers and texts, at most a batch of them, as they are stored."""
    more = config.batch - len(numbers)  # padded, for one compiled program
    text = np.stack(texts + texts[-1:] * more)
    states, end = map(np.asarray, follow(np.asarray(numbers + numbers[-1:] * more), text))
    if not (np.isfinite(states).all() and np.isfinite(end).all()):
        raise UserError(f"the teacher {config.checkpoint} produces states that are NaN or infinite; check its weights")
    dtype = config.store.replace("fp", "float")
    for n in range(len(numbers)):
        yield {"states": states[:, n].astype(dtype), "latents": end[n].astype(dtype), "text": text[n]}


def _model(sizes: Any) -> Any:
    from flax import nnx

    from monarchrt.models.wan import WanModel

    return WanModel(sizes, rngs=nnx.Rngs(0))


def _check_kept(path: Path, made: Made) -> None:
    """Raises UserError if an existing file was made with other settings."""
    with user_input():
        stored = Made.of_header(path, SafetensorsFile(path, only=()).metadata)
    differ = [
        f"{field.name} {getattr(stored, field.name)} (now {getattr(made, field.name)})"
        for field in dataclasses.fields(Made)
        if getattr(stored, field.name) != getattr(made, field.name)
    ]
    if differ:
        raise UserError(f"{path} already exists, made with {', '.join(differ)}; give another --out, or remove it")


def _examples(config: PairsConfig, opened: Any) -> tuple[Size, list[np.ndarray]]:
    """Frames, height and width of the latents, and the text embeddings [L, D]."""
    run = getattr(opened, "run", None)
    if config.latents is not None:
        folder = LatentFolder(config.latents, DataConfig(latents=config.latents))
        if folder.latent_shape[3] != opened.sizes.out_channels:
            raise UserError(
                f"latents {config.latents} has {folder.latent_shape[3]} channels, but the teacher {config.checkpoint} "
                f"makes {opened.sizes.out_channels}"
            )
        order = folder.train_files + folder.held_out_files
        with user_input():
            texts = [SafetensorsFile(path, only=("text",)).read("text").astype(np.float32) for path in order]
        for path, text in zip(order, texts, strict=True):
            _check_finite(f"latents {path}", text)
        return folder.latent_shape[:3], texts
    if config.embeddings is not None:
        from monarchrt.models.umt5 import load_embeddings

        by_text = load_embeddings(config.embeddings, length=opened.sizes.text_len)
        for text, embedding in by_text.items():
            _check_finite(f"embeddings {config.embeddings} of {text[:40]!r}", embedding)
        size = 1 + (config.frames - 1) // 4, config.height // 8, config.width // 8
        return size, [np.asarray(text, np.float32) for text in by_text.values()]
    if run is None or run.data.precomputed is not None or run.generation.latents is None:
        raise UserError("no texts were given; give --latents FOLDER, or --embeddings FILE of generate")
    return run.generation.latents, [np.zeros((1, opened.sizes.text_dim), np.float32)]


def _check_finite(what: str, text: np.ndarray) -> None:
    if not np.isfinite(np.asarray(text, np.float32)).all():
        raise UserError(f"{what} has text that is NaN or infinite; encode it again")


def _negative(config: PairsConfig) -> np.ndarray | None:
    if config.negative is None or config.weight == 1.0:
        return None
    from monarchrt.train.objectives.negative import negative_embedding

    return negative_embedding(config.negative)
