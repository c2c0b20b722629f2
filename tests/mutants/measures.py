"""Faults of what is measured, evaluations and studies, and of what attention is compared with."""

from tests.mutants.fault import Fault

COMPARED = ("tests/train/evaluation/test_compare.py",)
PICTURES = ("tests/train/test_pictures.py",)
MEASURES = ("tests/train/evaluation/test_measures.py",)
DISTANCES = ("tests/train/evaluation/test_distances.py",)
STUDIES = ("tests/train/studies/test_studies.py",)
IN_WAN = ("tests/models/attention/test_sparse_in_wan.py",)

MEASURED = (
    Fault("models/collectives.py", 'if before.startswith("((")', "if False", ("tests/models/test_collectives.py",)),
    Fault(
        "train/evaluation/metrics.py",
        "(1 - confidence) / 2, (1 + confidence) / 2",
        "1 - confidence, confidence",
        MEASURES,
        "interval",
    ),
    Fault(
        "train/evaluation/distances.py", "roots[0] @ roots[1]", "roots[0] @ roots[0]", DISTANCES, "root_of_the_product"
    ),
    Fault("train/evaluation/distances.py", "x_of[i], y_of[j], across)", "x_of[i], y_of[j], False)", DISTANCES, "group"),
    Fault(
        "train/evaluation/sets.py",
        "[sets.depth], np.float64), order",
        "[sets.depth], np.float64), 0",
        DISTANCES,
        "reports",
    ),
    Fault("train/evaluation/vbench.py", "tasks[number::count]", "tasks[number:count]", MEASURES, "each_part"),
    Fault("train/studies/mass.py", '{label}, block {block}"', '{label}"', STUDIES, "mass_that"),
    Fault("train/studies/maps.py", 'f"{number}: {scores.name}"', "scores.name", STUDIES, "maps_that"),
    Fault("train/sample.py", "[-sampled[0].shape[1] :]", "[: sampled[0].shape[1]]", PICTURES, "a_sample_of_latents"),
    Fault("train/pictures.py", "frames, state = decoder", "frames, _ = decoder", PICTURES, "by_their_vae"),
    Fault("train/objectives/ode.py", "text, noise[:, -frames:]", "text, noise", PICTURES, "sampled_as_one_clip"),
    Fault("models/wan/causal.py", "timesteps, cached=True)", "timesteps)", IN_WAN, "too_small"),
    Fault("train/studies/maps.py", "    partial.done()\n", "", STUDIES, "maps_that"),
    Fault("train/evaluation/vmaf.py", "zip(video, reference, strict", "zip(reference, video, strict", MEASURES, "vmaf"),
    Fault(
        "train/evaluation/compare.py",
        "measures=measures, given=given",
        "measures=measures",
        COMPARED,
        "that_begin",
    ),
    Fault("train/evaluation/lpips.py", " and arrays[key].shape == shape for", " for", MEASURES, "do_not_fit"),
    Fault("train/evaluation/lpips.py", "np.isfinite(array).all()", "np.isfinite(array).any()", MEASURES, "do_not_fit"),
    Fault("train/studies/config.py", "<= seed < 2**32", "<= seed <= 2**32", STUDIES, "bad_input"),
    Fault("train/evaluation/vbench.py", "self.seed <= 2**32 - STILL", "self.seed < 2**32", MEASURES, "do_not_reach"),
    Fault("train/evaluation/vbench.py", "else str(config.components)", "else None", MEASURES, "each_part"),
    Fault(
        "train/evaluation/vbench.py",
        "advance(task.videos - len(missing), task.prompt)",
        "advance(len(missing), task.prompt)",
        MEASURES,
        "a_bar",
    ),
    Fault(
        "train/evaluation/vbench.py",
        "if path.is_dir() else path.parent).resolve()",
        "if path.is_dir() else path).resolve()",
        MEASURES,
        "side_by_side",
    ),
    Fault(
        "train/evaluation/config.py", "if not 0 <= seed < 2**32:", "if not 0 <= seed <= 2**32:", COMPARED, "bad_input"
    ),
    Fault(
        "train/studies/tiles.py",
        'point["video_front"] = point["psnr"] > best',
        'point["video_front"] = point["front"]',
        STUDIES,
        "both_fronts",
    ),
    Fault(
        "train/studies/tiles.py",
        "1 + (given - 1) * per_latent if given",
        "given * per_latent if given",
        STUDIES,
        "begins_with",
    ),
    Fault(
        "train/studies/tiles.py",
        "relative_error(latents[:, given:], expected[:, given:])",
        "relative_error(latents, expected)",
        STUDIES,
        "begins_with",
    ),
)
