"""Faults of what is measured, evaluations and studies, and of what attention is compared with."""

from tests.mutants.fault import Fault

COMPARED = ("tests/train/evaluation/test_compare.py",)
PICTURES = ("tests/train/test_pictures.py",)
MEASURES = ("tests/train/evaluation/test_measures.py",)
DISTANCES = ("tests/train/evaluation/test_distances.py",)
STUDIES = ("tests/train/studies/test_studies.py",)
IN_WAN = ("tests/models/attention/test_sparse_in_wan.py",)

MEASURED = (
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
)
