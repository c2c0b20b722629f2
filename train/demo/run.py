"""Runs the demo: trains dense, trains it further, swaps in Monarch attention, finetunes, measures and plots."""

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from monarchrt.models.errors import NonFiniteError, report_full_disk, user_input
from monarchrt.models.wan import Attention, WanModel
from monarchrt.train.config import TrainConfig, to_dict
from monarchrt.train.data import ClipWindows
from monarchrt.train.demo.config import DemoConfig, dense_run, further_runs
from monarchrt.train.demo.distil import run_distillation
from monarchrt.train.demo.few_steps import distillations
from monarchrt.train.demo.film import write_film
from monarchrt.train.demo.folder import claim_demo, write_settings
from monarchrt.train.demo.pictures import draw_attention, draw_losses
from monarchrt.train.evaluate import held_out_loss
from monarchrt.train.interrupt import Interrupted
from monarchrt.train.loop import TrainResult, train
from monarchrt.train.model import attention_setting, model_settings
from monarchrt.train.sources import open_source


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The held-out losses of the demo.

    Attributes:
        dense: Loss of the dense model.
        control: Loss of the dense model trained for as many further steps as finetuning takes.
        untrained: Loss with the dense model's parameters and Monarch attention.
        finetuned: Loss after finetuning with Monarch attention.
        sparsity: Fraction of the attention map that Monarch does not store.
        seconds: Duration of this call of the demo, without the start of the program.
    """

    dense: float
    control: float
    untrained: float
    finetuned: float
    sparsity: float
    seconds: float

    @property
    def gap(self) -> float:
        """Increase of the loss by the swap, relative to dense attention after as many steps."""
        return self.untrained - self.control

    @property
    def closed(self) -> float | None:
        """Fraction of the gap that finetuning closes, which may exceed 1; None if there is no gap."""
        return (self.untrained - self.finetuned) / self.gap if self.gap > 0 else None


def run_demo(config: DemoConfig, *, quiet: bool | None = None) -> DemoResult | None:
    """Runs the demo and writes its folder.

    Args:
        config: The settings.
        quiet: Whether to hide the progress bars; None shows them on a terminal only.

    Returns:
        The losses; None with `distill`, whose results are in distillation.json.

    Raises:
        UserError: If the video, a setting or the folder cannot be used.
        NonFiniteError: If a loss, a gradient or the parameters became NaN or infinite.
        Interrupted: After a signal; the message says how to resume.
    """
    start = time.monotonic()
    console = Console(quiet=bool(quiet), highlight=False)
    claim_demo(config)
    dense_config, (_, monarch_config) = dense_run(config), further_runs(config)
    students = distillations(config)
    source, setting, grid = _prepare(dense_config, monarch_config)
    write_settings(config)
    sparsity = 1 - setting.density(grid).kept
    frames, rows, columns = grid
    console.print(
        f"clip {config.clip.name}: {len(source.frames)} frames in windows of {frames}, {rows} x {columns} tokens each; "
        f"Monarch tile {config.tile}, {sparsity:.1%} sparse"
    )

    def trained(settings: TrainConfig) -> TrainResult:
        with _with_advice_for_demo(config):
            result = train(settings, source=source, quiet=quiet)
        if settings.objective.name == dense_config.objective.name:  # losses of other objectives are not comparable
            console.print(f"   held-out loss {result.held_out_loss:.4f}")
        return result

    console.print(f"\n1. train a dense model from scratch, {config.steps} steps")
    dense = trained(dense_config)
    if config.distill:
        run_distillation(config, students, dense.model, source, trained, console, begun=start)
        return None
    return _finetune(config, dense, setting, source, trained, console, begun=start, sparsity=sparsity)


def _finetune(
    config: DemoConfig,
    dense: TrainResult,
    setting: Attention,
    source: ClipWindows,
    trained: Callable[[TrainConfig], TrainResult],
    console: Console,
    *,
    begun: float,
    sparsity: float,
) -> DemoResult:
    """Swaps Monarch attention into the dense model, finetunes it, and writes the comparison with a control."""
    folder, dense_config, (control_config, monarch_config) = config.folder, dense_run(config), further_runs(config)
    console.print(f"\n2. train it further, {config.finetune_steps} steps, to compare with")
    control = trained(control_config)
    console.print("\n3. swap Monarch attention into the dense model, train nothing")
    swapped = dense.model.with_attention(setting)
    untrained = _loss(swapped, source, dense_config)
    console.print(f"   held-out loss {untrained:.4f}")
    console.print(f"\n4. finetune it, {config.finetune_steps} steps like those of 2")
    monarch = trained(monarch_config)
    console.print()

    result = DemoResult(
        dense=dense.held_out_loss,
        control=control.held_out_loss,
        untrained=untrained,
        finetuned=monarch.held_out_loss,
        sparsity=sparsity,
        seconds=round(time.monotonic() - begun, 1),
    )
    models = {"dense": control.model, "Monarch, untrained": swapped, "Monarch, finetuned": monarch.model}
    maps = models | {"dense": dense.model}  # with the same parameters as after the swap
    written = [
        draw_losses(folder / "losses.png", dense_config, control_config, monarch_config),
        draw_attention(folder / "attention.png", maps, source, dense_config),
        write_film(folder / "comparison.mp4", models, source, dense_config),
        _write_results(folder / "results.json", config, result),
    ]
    console.print(result_table(result))
    names = ", ".join(path.name for path in written)
    console.print(f"\n{result.seconds:.0f} s, the program's start aside; everything is in {folder}: {names}")
    return result


@contextlib.contextmanager
def _with_advice_for_demo(config: DemoConfig) -> Iterator[None]:
    """Replaces the advice in messages of a training run, which is for `monarchrt train`, by that for the demo."""
    try:
        yield
    except Interrupted as stop:
        if stop.step is None:
            raise
        raise Interrupted(
            f"stopped at step {stop.step} and saved; continue with {_resume_command(config)}",
            code=stop.code,
            step=stop.step,
        ) from None
    except NonFiniteError as error:
        raise NonFiniteError(
            error.finding, advice="try another --seed, with another --folder", step=error.step
        ) from error


def _resume_command(config: DemoConfig) -> str:
    """The command that resumes a demo, whose other settings are in the folder."""
    return shlex.join(["monarchrt", "demo", "--folder", str(config.folder), "--resume"])


def _prepare(dense: TrainConfig, monarch: TrainConfig) -> tuple[ClipWindows, Attention, tuple[int, int, int]]:
    """The data, the attention to swap in and the token grid; checks that the tile fits."""
    wan = model_settings(dense.model)
    source = open_source(dense.data, text_shape=(1, wan.text_dim))
    setting = attention_setting(monarch.model)
    if not isinstance(source, ClipWindows):
        raise TypeError("the demo works on a clip")
    with user_input():
        grid = wan.token_grid(*source.latent_shape[:3])
        setting.check(grid)
    return source, setting, grid


def _loss(model: WanModel, source: ClipWindows, config: TrainConfig) -> float:
    """The held-out loss, as in the training runs."""
    return held_out_loss(
        model,
        source,
        objective=config.objective,
        windows=config.run.eval_windows,
        timesteps=config.run.eval_timesteps,
        batch=config.run.batch,
    )


def _write_results(path: Path, config: DemoConfig, result: DemoResult) -> Path:
    values = dataclasses.asdict(result) | {"gap": result.gap, "closed": result.closed, "config": to_dict(config)}
    with report_full_disk(path):
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def result_table(result: DemoResult) -> Table:
    """The held-out losses as a table, one row per model."""
    table = Table("attention", "map stored", "held-out loss", "loss won back")
    stored = f"{1 - result.sparsity:.1%}"
    closed = "none was lost" if result.closed is None else f"{result.closed:.0%}"
    table.add_row("dense", "100%", f"{result.dense:.4f}", "")
    table.add_row("dense, trained further", "100%", f"{result.control:.4f}", "")
    table.add_row("Monarch, untrained", stored, f"{result.untrained:.4f}", "0%")
    table.add_row("Monarch, finetuned", stored, f"{result.finetuned:.4f}", closed)
    return table
