"""`monarchrt evaluate`: the same weights, prompts, seeds and noise under several attention settings.

settings.json         the settings of the evaluation
samples/P-S/N.npz     prompt P, seed S, setting N (0 is the reference): frames, latents, latents of each step
samples/P-S/N.mp4     the same video, to watch
samples/P-S/N.json    its measures against the reference's video
samples/P-S/N.features.npz   with --features, the features of its frames
losses/N.npy          the terms of the held-out loss
report.json, .png     the report as JSON and as plots
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.densities import NetworkDensity, density_of_network
from monarchrt.models.attention.notation import parse
from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.errors import UserError, report_full_disk, user_input
from monarchrt.models.files import growing
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.material import Material
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import check_attention
from monarchrt.models.media.video import write_mp4
from monarchrt.models.wan.watched import watching
from monarchrt.train.config import to_dict
from monarchrt.train.evaluate import held_out_terms
from monarchrt.train.evaluation import metrics
from monarchrt.train.evaluation.config import EvaluateConfig
from monarchrt.train.evaluation.features import FeatureNetwork, read_features
from monarchrt.train.evaluation.lpips import SMALLEST as LPIPS_SMALLEST
from monarchrt.train.evaluation.lpips import read_lpips
from monarchrt.train.evaluation.report import summarise, write_report
from monarchrt.train.evaluation.sets import Sets, distances, features_of, plan_sets, real_windows
from monarchrt.train.evaluation.subject import Subject, open_subject, video_of
from monarchrt.train.evaluation.vmaf import SMALLEST, find_vmaf
from monarchrt.train.resuming import check_unchanged, read_stored
from monarchrt.train.studies.results import progress, write_json
from monarchrt.train.texts import read_prompts

SETTINGS, REPORT = "settings.json", "report.json"


class Sample(NamedTuple):
    """One video.

    Attributes:
        frames: Frames [T, H, W, 3], uint8.
        latents: Latents [F, h, w, C].
        steps: Input latents of the network by timestep, those of all calls of the video at a timestep concatenated.
    """

    frames: np.ndarray
    latents: np.ndarray
    steps: dict[float, np.ndarray]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs or resumes an evaluation, and writes its report.

    Args:
        config: The settings.

    Returns:
        The content of report.json.

    Raises:
        UserError: If a setting cannot be used; before anything is computed where possible.
    """
    if not config.attention:
        raise UserError(
            "no attention was given; give settings to compare, such as --attention 'monarch(tile=(1,30,52))'"
        )
    settings = [parse(text) for text in (config.reference, *config.attention)]
    measures = _measures(config)
    prompts = [None] if config.prompts is None else read_prompts(config.prompts)
    network = None if config.features is None else read_features(config.features)
    if network is not None:  # checked before a checkpoint is opened; the number of frames is not known yet
        plan_sets(network, videos=len(prompts) * len(config.seeds), frames=max(network.widths) + 1)
    if config.prompts is not None and not _is_wan(config):
        raise UserError(
            f"prompts is {config.prompts}, but checkpoint {config.checkpoint} is a run folder, which takes no text; "
            f"leave it out"
        )
    with _claimed(config):
        records = _records(config, settings, prompts, measures, network)
    report = summarise(records, confidence=0.95) | {"config": to_dict(config)}
    write_json(config.out / REPORT, report)
    write_report(config.out, report)
    return report


def _records(
    config: EvaluateConfig,
    settings: list[Attention],
    prompts: list,
    measures: dict,
    network: FeatureNetwork | None,
) -> dict[str, Any]:
    """All measurements."""
    subject = None
    if config.windows and not (config.latents is None and _is_wan(config)):
        subject = open_subject(config.checkpoint, video=config.video, latents=config.latents)
        for setting in settings:
            with user_input():
                subject.model.with_attention(setting).config  # noqa: B018  layers and parameters are checked here
                setting.check(subject.grid, causal_block=subject.model.config.causal_block)
    records: dict[str, Any] = {"settings": [str(setting) for setting in settings], "samples": []}
    if config.videos:
        records["samples"] = _all_samples(config, settings, prompts, measures, network)
        if network is not None:
            records["distances"] = _distances(config, network, settings, len(prompts))
    if subject is not None:
        records["losses"] = _losses(config, subject, settings)
        records["examples"] = min(config.windows, subject.source.held_out)
        records["density"] = [_density(subject, setting)._asdict() for setting in settings]
    if made := records["samples"]:  # the density of a video also depends on its number of steps
        records["density"] = [made[index]["density"] for index in range(len(settings))]
    return records


def _is_wan(config: EvaluateConfig) -> bool:
    """Whether the checkpoint is not a run folder, so that a held-out loss needs `latents`."""
    return not (Path(config.checkpoint or "") / "checkpoints").is_dir()


def _density(subject: Subject, setting: Attention) -> NetworkDensity:
    config = subject.model.config
    return density_of_network(setting, config.num_layers, subject.grid, causal_block=config.causal_block)


@contextlib.contextmanager
def _claimed(config: EvaluateConfig) -> Iterator[None]:
    """Claims the folder, and restores it if the settings cannot be used and nothing was generated."""
    folder, was_there = config.out, config.out.is_dir()
    _claim(config)
    try:
        yield
    except UserError:
        inside = sorted(folder.rglob("*"), reverse=True)
        if [path for path in inside if not path.is_dir()] == [folder / SETTINGS]:
            for path in inside:
                path.rmdir() if path.is_dir() else path.unlink()
            if not was_there:
                folder.rmdir()
        raise


def _claim(config: EvaluateConfig) -> None:
    """Creates the folder, or checks that it has an evaluation with the same settings, to resume.

    Raises:
        UserError: If the folder has other files, another evaluation, or one while `resume` is not set.
    """
    folder, values = config.out, to_dict(dataclasses.replace(config, resume=False, quiet=False))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out {folder} is a file; give the path of a folder")
    there = folder / SETTINGS
    if not there.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"out {folder} holds other files, and no evaluation; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(there, values)
        return
    if not config.resume:
        raise UserError(f"out {folder} holds an evaluation already; give --resume to continue it, or another --out")
    check_unchanged(values, read_stored(there), of=f"the evaluation in {folder}")


# Videos


def _measures(config: EvaluateConfig) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray | None]]:
    """Measures (video, reference) -> value of each frame, by name; None if frames are too small for a measure."""
    measures: dict[str, Callable] = {
        "psnr": metrics.psnr,
        "ssim_gaussian": metrics.ssim_gaussian,
        "ssim_box": metrics.ssim_box,
    }
    if config.lpips is not None:
        network = read_lpips(*config.lpips)
        measures[f"lpips_{network.network}"] = network
    if config.videos and (judge := find_vmaf(config.ffmpeg)) is not None:

        def perceived(video: np.ndarray, reference: np.ndarray) -> np.ndarray | None:
            if config.ffmpeg is None and min(video.shape[1:3]) < SMALLEST:
                return None  # VMAF was not requested
            return np.array(judge(video, reference))

        measures["vmaf"] = perceived
    return measures


def _all_samples(
    config: EvaluateConfig,
    settings: list[Attention],
    prompts: list,
    measures: dict,
    network: FeatureNetwork | None,
) -> list[dict]:
    records = []
    total = len(prompts) * len(config.seeds) * len(settings)
    with progress("videos", total, quiet=config.quiet) as advance:
        for number, prompt in enumerate(prompts):
            material: Material | None = None
            for seed in config.seeds:
                folder = config.out / "samples" / f"{number}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                reference: Sample | None = None
                for index, setting in enumerate(settings):
                    advance(0, str(setting))
                    done = folder / f"{index}.json"
                    if not done.is_file():
                        if material is None:
                            material = _material(config, prompt, settings)
                            _check_sets(config, network, material, len(prompts))
                            _check_sides(config, material, measures)
                        if reference is None:
                            reference = _sample(material, settings[0], seed, folder / "0.npz")
                        made = reference if index == 0 else _sample(material, setting, seed, folder / f"{index}.npz")
                        blocks = _frames_of_blocks(material)
                        given = 0 if material.initial is None else material.initial.shape[1]
                        values = compare(made, reference, blocks=blocks, measures=measures, given=given)
                        values["density"] = _density_of_video(material, setting)._asdict()
                        write_mp4(folder / f"{index}.mp4", made.frames, fps=material.plan.config.fps or 16.0)
                        write_json(done, values)
                    records.append({"prompt": number, "seed": seed, "setting": index, **read_json(done)})
                    advance()
    return records


def _density_of_video(material: Material, setting: Attention) -> NetworkDensity:
    return check_attention(dataclasses.replace(material.plan, attention=setting), material.pipeline.model.config)


def _check_sets(config: EvaluateConfig, network: FeatureNetwork | None, material: Material, prompts: int) -> None:
    """Raises UserError unless there will be enough generated and real videos for distances."""
    if network is None:
        return
    sets = plan_sets(network, videos=prompts * len(config.seeds), frames=sum(_frames_of_blocks(material)))
    if config.real is not None:
        _, height, width = (side * material.plan.spatial for side in material.plan.latents)
        real_windows(config.real, sets, height=height, width=width)


def _check_sides(config: EvaluateConfig, material: Material, measures: dict) -> None:
    """Raises UserError unless frames will be large enough for the requested measures."""
    _, height, width = (side * material.plan.spatial for side in material.plan.latents)
    asked = {f"lpips ({name})": least for name, least in LPIPS_SMALLEST.items() if f"lpips_{name}" in measures}
    if config.ffmpeg is not None:
        asked["vmaf"] = SMALLEST
    for name, least in asked.items():
        if min(height, width) < least:
            option = "--ffmpeg" if name == "vmaf" else "--lpips"
            raise UserError(
                f"frames are {height} x {width}, but {name} needs at least {least} pixels per side; leave {option} "
                f"out, or make larger videos"
            )


def _distances(
    config: EvaluateConfig, network: FeatureNetwork, settings: list[Attention], prompts: int
) -> list[dict[str, float]]:
    """Distances of each setting's videos to the real ones, or to the reference's."""
    names = [f"{prompt}-{seed}" for prompt in range(prompts) for seed in config.seeds]
    sets: Sets | None = None
    found: list[list[list[np.ndarray]]] = [[] for _ in settings]
    with progress("features", len(names) * len(settings), quiet=config.quiet) as advance:
        for name in names:
            for index in range(len(settings)):
                folder = config.out / "samples" / name
                with np.load(folder / f"{index}.npz") as stored:
                    frames = stored["frames"]
                sets = sets or plan_sets(network, videos=len(names), frames=len(frames))
                found[index].append(features_of(sets, frames, folder / f"{index}.features.npz"))
                height, width = frames.shape[1:3]
                advance()
    if sets is None:
        return [{} for _ in settings]
    if config.real is None:
        return [{}, *(distances(made, found[0], sets, paired=True) for made in found[1:])]
    real = [network(clip) for clip in real_windows(config.real, sets, height=height, width=width)]
    return [distances(made, real, sets, paired=False) for made in found]


def _material(config: EvaluateConfig, prompt: str | None, settings: list[Attention]) -> Material:
    given = GenerateConfig(
        checkpoint=config.checkpoint,
        attention=config.reference,
        prompt=prompt,
        components=config.components,
        frames=config.frames,
        height=config.height,
        width=config.width,
        mode=config.mode,
        steps=config.steps,
    )
    material = video_of(given, config.video)
    for setting in settings:  # checks them before the first video is generated
        _density_of_video(material, setting)
    return material


def _sample(material: Material, setting: Attention, seed: int, path: Path) -> Sample:
    """Reads a video from its file, or generates and writes it."""
    if path.is_file():
        with np.load(path) as stored:
            names = [name for name in stored.files if name.startswith("step-")]
            steps = {float(name.removeprefix("step-")): stored[name] for name in names}
            return Sample(stored["frames"], stored["latents"], steps)
    plan = dataclasses.replace(material.plan, config=dataclasses.replace(material.plan.config, seed=seed))
    kept: list[Any] = []
    with user_input(), watching(material.pipeline.model.with_attention(setting)) as (model, calls):
        pipeline = VideoPipeline(model, material.pipeline.decoder)
        frames = np.concatenate(
            list(pipeline(material.text, **dataclasses.replace(material, plan=plan).options(), keep=kept))
        )
    latents = np.concatenate([np.asarray(part) for part in kept], axis=1)[0]
    by_step: dict[float, list[np.ndarray]] = {}
    for call in calls:
        by_step.setdefault(float(call.timesteps.max()), []).append(call.latents[0])
    joined = {step: np.concatenate(parts) for step, parts in by_step.items()}
    sample = Sample(frames, latents, joined)
    arrays: dict[str, Any] = {"frames": frames, "latents": latents} | {
        f"step-{step}": part for step, part in joined.items()
    }
    with report_full_disk(path, then="free some space and use --resume"), growing(path) as part:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    return sample


def _frames_of_blocks(material: Material) -> list[int]:
    """The number of frames of each part of a video, over which drift is measured."""
    plan = material.plan
    parts = plan.parts or [1] * plan.latents[0]
    counts = [plan.temporal * part for part in parts]
    counts[0] += 1 - plan.temporal  # the first latent is one frame
    return counts


def compare(
    made: Sample,
    reference: Sample,
    *,
    blocks: list[int],
    measures: dict[str, Callable[..., np.ndarray | None]],
    given: int = 0,
) -> dict[str, Any]:
    """Measures a video against the reference's: means, drift over blocks, and error of the latents by timestep.

    Given frames at the start of a video are not measured, except in flicker.

    Args:
        made: The video.
        reference: The reference's video, generated from the same noise.
        blocks: Number of frames of each block, together all frames of the video.
        measures: Measures per frame, by name.
        given: Number of given latent frames at the start.

    Returns:
        Values by name; `drift` has lists by measure, `steps` errors by timestep.
    """
    measured = {name: measure(made.frames, reference.frames) for name, measure in measures.items()}
    left, blocks = _after(blocks, given, latents=len(made.latents))
    per_frame = {name: np.asarray(values)[left:] for name, values in measured.items() if values is not None}
    steps = {step: metrics.relative_error(part, reference.steps[step]) for step, part in made.steps.items()}
    values: dict[str, Any] = {name: float(of_frames.mean()) for name, of_frames in per_frame.items()}
    if len(made.frames) > 1:
        values["flicker"] = metrics.flicker(made.frames)
    values["latent_error"] = metrics.relative_error(made.latents[given:], reference.latents[given:])
    values["steps"] = {f"{step:g}": error for step, error in sorted(steps.items(), reverse=True)}
    values["drift"] = {name: metrics.drift(of_frames, blocks) for name, of_frames in per_frame.items()}
    return values


def _after(blocks: list[int], given: int, *, latents: int) -> tuple[int, list[int]]:
    """The number of given frames, and the numbers of frames of the blocks after them.

    Examples:
        >>> _after([1, 1, 1], 1, latents=3), _after([9, 12], 1, latents=6), _after([9, 12], 3, latents=6)
        ((1, [1, 1]), (1, [8, 12]), (9, [12]))
    """
    per_latent = (sum(blocks) - 1) // (latents - 1) if latents > 1 else 1  # the first latent is one frame
    frames = rest = 1 + (given - 1) * per_latent if given else 0
    after = []
    for count in blocks:
        taken = min(rest, count)
        rest -= taken
        after += [count - taken] if count > taken else []
    return frames, after


# The held-out loss


def _losses(config: EvaluateConfig, subject: Subject, settings: list[Attention]) -> list[list[float]]:
    folder = config.out / "losses"
    folder.mkdir(exist_ok=True)
    losses = []
    with progress("held-out loss", len(settings), quiet=config.quiet) as advance:
        for index, setting in enumerate(settings):
            path = folder / f"{index}.npy"
            if not path.is_file():
                terms = loss_terms(subject, setting, config)
                with growing(path) as part:
                    with part.open("wb") as file:
                        np.save(file, terms)
                    os.replace(part, path)
            losses.append(np.load(path).tolist())
            advance()
    return losses


def loss_terms(subject: Subject, setting: Attention, config: Any) -> np.ndarray:
    """Computes the terms of the held-out loss with an attention setting.

    Args:
        subject: Network and examples.
        setting: The attention setting.
        config: Settings with `windows`, `timesteps` and `batch`, as for `held_out_terms`.
    """
    with user_input():
        return held_out_terms(
            subject.model.with_attention(setting),
            subject.source,
            objective=subject.objective,
            windows=config.windows,
            timesteps=config.timesteps,
            batch=config.batch,
        )
