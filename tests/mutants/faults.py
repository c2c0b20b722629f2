"""The faults: one line each, in the kind of a slip, and the tests that should notice it."""

from tests.mutants.distilling import DISTILLING
from tests.mutants.fault import Fault
from tests.mutants.files import FILES
from tests.mutants.measures import MEASURED
from tests.mutants.meshes import MESHES
from tests.mutants.passes import PASSES
from tests.mutants.serving import SERVING
from tests.mutants.sparse import BESIDE_PUBLISHED, BLOCK_SPARSE

DEFINITION = ("tests/attention/test_definition.py",)
BACKENDS = ("tests/attention/test_backends.py",)
CACHE = ("tests/attention/test_cache.py",)
SPEC = ("tests/attention/test_spec.py",)
SPLIT = ("tests/attention/test_partitioning.py",)
MOSAIC = ("tests/kernels/test_mosaic.py",)
MOSAIC_EIGHT = ("tests/kernels/test_mosaic_e4m3.py",)
EIGHT = ("tests/attention/test_intermediates.py",)
REFINED = ("tests/kernels/test_mosaic_refined.py",)
MOSAIC_BACK = ("tests/kernels/test_mosaic_backward.py",)
TRITON = tuple(f"tests/kernels/test_{name}.py" for name in ("triton", "triton_calls", "triton_plan"))
CONVOLUTION = ("tests/kernels/test_convolution.py",)
LISTED = ("tests/models/attention/test_listed.py",)
VAE = ("tests/models/vae/test_vae.py",)
UMT5 = ("tests/models/umt5/test_encoder.py",)
SOLVERS = ("tests/models/sampling/test_solvers.py",)
WAN = ("tests/models/test_wan.py",)
FP8 = ("tests/models/test_fp8.py",)
STATE = ("tests/train/test_state.py",)
OBJECTIVE = ("tests/train/test_objective.py",)
CONSISTENCY = ("tests/train/objectives/test_consistency.py",)
ROLL_OUTS = ("tests/train/objectives/test_windows.py",)
ADVERSARIAL = ("tests/train/objectives/test_adversarial.py",)
DURATION = ("tests/train/test_duration.py",)
WATCH = ("tests/train/test_watch.py",)
SEEN = ("tests/models/media/test_seen.py",)
WINDOWS = ("tests/models/sampling/test_windows.py",)
RELATIVES = ("tests/models/test_relatives.py",)
CHECKPOINTS = ("tests/models/test_checkpoints.py", "tests/models/test_torch_checkpoints.py")
ARCHIVES = ("tests/models/test_hostile_archives.py",)
SCHEDULE = ("tests/models/attention/test_schedule.py",)
SPARSE = ("tests/models/attention/test_sparse.py",)
SPARSE_KERNELS = ("tests/kernels/test_block_sparse.py",)
COMMANDS = ("tests/train/test_command_line.py",)
INTERRUPT = ("tests/train/test_interrupt.py",)
TEXTS = ("tests/train/test_texts.py",)
DISTILLATION = ("tests/train/objectives/test_distillation.py",)
UNROLLED = ("tests/models/test_unrolled.py",)
LIVE = ("tests/models/sampling/test_live.py",)
STRANGERS = ("tests/train/test_generate_files.py",)

FAULTS = (
    *MESHES,
    *PASSES,
    *FILES,
    Fault("models/sampling/rollout.py", "@lru_cache(maxsize=64)", "", LIVE, "second_video"),
    Fault("models/wan/fused.py", "time, (before, 5),", "time, (table, 5),", UNROLLED, "passes"),
    Fault(
        "models/wan/fused.py", "(joined, width), (joined, 2 * width)", "(joined, 2 * width), (joined, width)", UNROLLED
    ),
    Fault("monarch_jax/cache.py", 'in ("fh,w", "f,hw")', 'in ("fh,w", "f,hw", "w,fh")', UNROLLED, "order"),
    Fault(
        "models/sampling/rollout.py",
        "self._rollout.table().steps + given,",
        "self._rollout.table().steps + (not given),",
        LIVE,
        "wait or context",
    ),
    # the operation
    Fault("monarch_jax/reference.py", "MAX_FACTOR = 1e-6, 1e4", "MAX_FACTOR = 1e-6, 1e5", DEFINITION, "guard"),
    Fault("monarch_jax/reference.py", "1 / (c_r + EPSILON)", "1 / c_r", DEFINITION, "guard or pytorch"),
    Fault(
        "monarch_jax/reference.py",
        "c_l = (right * log_right).sum(-1)",
        "c_l = -(right * log_right).sum(-1)",
        DEFINITION,
        "pytorch",
    ),
    Fault(
        "monarch_jax/xla.py",
        "d_right = d_right + d_cl[..., None] * log_right",
        "d_right = d_right + d_cl[..., None]",
        DEFINITION,
        "pytorch",
    ),
    Fault("monarch_jax/xla.py", "d_cl = -d_scores.sum(4)", "d_cl = d_scores.sum(4)", DEFINITION, "pytorch"),
    Fault(
        "monarch_jax/contract.py",
        "[None, :] < visible[:, None]",
        "[None, :] <= visible[:, None]",
        DEFINITION,
        "pytorch",
    ),
    Fault(
        "monarch_jax/spec.py",
        "2 * (3 * right + 2 * left) + 3 * extra",
        "2 * (3 * right + 2 * left) + 2 * extra",
        SPEC,
        "costs",
    ),
    Fault(
        "monarch_jax/spec.py",
        "extra = (spec.num_iters - 1) * (2 * right + 2 * left)",
        "extra = (spec.num_iters - 1) * (2 * right + left)",
        SPEC,
        "costs",
    ),
    Fault(
        "monarch_jax/tiles.py",
        "block_end = (frame // spec.causal_block + 1)",
        "block_end = (frame // spec.causal_block + 2)",
        SPEC,
        "frame_by_frame",
    ),
    Fault(
        "monarch_jax/cache.py",
        "not isinstance(length, int) or length >= frames",
        "not isinstance(length, int) or length >= 0",
        CACHE,
        "queries_without",
    ),
    Fault(
        "monarch_jax/cache.py",
        "sinks + (position - sinks) % (groups - sinks)",
        "(position - sinks) % (groups - sinks)",
        CACHE,
        "rolling_window",
    ),
    Fault(
        "monarch_jax/partitioning.py", "index = index * sizes[name] + ", "index = index + ", SPLIT, "work_on_their_part"
    ),
    Fault(
        "monarch_jax/partitioning.py",
        "PartitionSpec(batch, None, heads, None)",
        "PartitionSpec(None, None, None, None)",
        SPLIT,
        "however",
    ),
    Fault("monarch_jax/devices.py", "present >= capability", "present > capability", BACKENDS, "compute_capability"),
    # Mosaic
    Fault(
        "pallas_kernels/__init__.py",
        "int(capability) != CAPABILITY",
        "int(capability) < CAPABILITY",
        BACKENDS,
        "hopper",
    ),
    Fault(
        "pallas_kernels/sm90/config.py",
        "            self.warpgroups * ROWS * 4,\n            barriers=2 * self.query_stages",
        "            barriers=2 * self.query_stages",
        MOSAIC,
        "shared_memory",
    ),
    Fault(
        "pallas_kernels/sm90/config.py",
        "out = self.warpgroups * 2 * ROWS * dim * width",
        "out = self.warpgroups * ROWS * dim * width",
        MOSAIC,
        "shared_memory",
    ),
    Fault("monarch_jax/intermediates.py", "BFLOAT16) / LARGEST", "BFLOAT16) / 240", EIGHT, "the_definition"),
    Fault(
        "pallas_kernels/sm90/left_e4m3.py",
        "lax.bitcast_convert_type(word & UPPER, jnp.float32)",
        "lax.bitcast_convert_type(word, jnp.float32) * 1.1",
        MOSAIC_EIGHT,
        "numbers_in",
    ),
    Fault("pallas_kernels/sm90/left_e4m3.py", "c - jnp.log2(y)", "c - jnp.log2(y + 1)", MOSAIC_EIGHT, "far_apart"),
    Fault(
        "pallas_kernels/sm90/left_e4m3.py",
        "TOTAL: jnp.where(there, 1 / y,",
        "TOTAL: jnp.where(there, 1,",
        MOSAIC_EIGHT,
        "far_apart",
    ),
    Fault("pallas_kernels/sm90/shared.py", "LOG2E = math.log2(math.e)", "LOG2E = 1.0", MOSAIC, "numbers_in"),
    Fault(
        "pallas_kernels/sm90/right_backward_items.py",
        "mean = (r * d_r).sum(axis=1) * scale",
        "mean = (r * d_r).sum(axis=1)",
        MOSAIC_BACK,
        "numbers_and_no_races",
    ),
    Fault(
        "pallas_kernels/sm90/roles.py",
        "lax.rem(x, self.tiles)\n",
        "lax.div(x, self.tiles)\n",
        MOSAIC_BACK,
        "numbers_and_no_races",
    ),
    # Triton
    Fault(
        "triton_kernels/operation.py",
        "first_tile = jnp.max(visible)",
        "first_tile = jnp.min(visible)",
        TRITON,
        "newest",
    ),
    Fault(
        "triton_kernels/operation.py",
        "jnp.int32(min(grad_tiles, k.shape[1]))",
        "jnp.int32(grad_tiles)",
        TRITON,
        "newest",
    ),
    Fault("triton_kernels/plan.py", "min(*columns, 2 * shape.dim)", "min(*columns)", TRITON, "scores_gradient"),
    Fault("triton_kernels/plan.py", "save_dz = grad_tiles is None and ", "save_dz = ", TRITON, "scores_gradient"),
    Fault(
        "triton_kernels/left.py",
        "total = total * shrink + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        TRITON,
        "interpreter_agrees",
    ),
    Fault(
        "triton_kernels/refine_backward.py",
        "tl.where(factor < MAX_FACTOR, product, 0.0)",
        "product",
        TRITON,
        "interpreter_agrees",
    ),
    Fault("triton_kernels/refine_backward.py", "1) - less_i", "1)", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/refine_pairs.py", "(end + 63) // 64 * 64", "end", TRITON, "between_steps_agree"),
    Fault("triton_kernels/refine_pairs.py", "tl.where(factor < MAX", "tl.where(factor <= MAX", TRITON, "steps_agree"),
    Fault("triton_kernels/refine_pairs.py", "tile % PACKED * TAIL + j", "j", TRITON, "between_steps_agree"),
    Fault(
        "pallas_kernels/sm90/left_refine_backward.py", "enumerate(((p * wide)", "enumerate(((p)", REFINED, "two_steps"
    ),
    Fault(
        "pallas_kernels/sm90/left_refine_backward.py",
        "jnp.where(pair < limit, plgpu",
        "jnp.where(pair < limit + 1, plgpu",
        REFINED,
        "two_steps",
    ),
    Fault("pallas_kernels/sm90/refined.py", "dq.astype(jnp.float32) + part", "part", REFINED, "two_steps"),
    Fault("pallas_kernels/sm90/refined.py", "dk = dk + more", "dk = more", REFINED, "two_steps"),
    Fault(
        "triton_kernels/plan.py",
        '("mid", *(name for name in keys.writes if name != "mid"))',
        "keys.writes",
        TRITON,
        "in_place",
    ),
    Fault("triton_kernels/__init__.py", "abs(problem.scale) < LEAST", "problem.scale < -LEAST", BACKENDS, "scale"),
    # block-sparse attention
    Fault("triton_kernels/sparse.py", "shrink = tl.exp2(top - new_top)", "shrink = 1.0", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/sparse.py", "tl.minimum(n + 1, n_all", "tl.minimum(n, n_all", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/sparse.py", "none = top < SEES_NONE", "none = top < LOWEST", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/sparse.py", "clear_rest(dv, end, NK", "clear_rest(dv, NK, NK", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/sparse.py", "+ wide(n // SLICES, LISTED", "+ wide(n, LISTED", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/sparse.py", "tl.program_id(0) % PARTS * N + tl", "tl", TRITON, "interpreter_agrees"),
    Fault("triton_kernels/sparse.py", "| (key_place < SINK)", "| (key_place <= SINK)", TRITON, "interpreter_agrees"),
    Fault(
        "monarch_jax/block_mask.py",
        "uncut & (shorter[1] == 0)",
        "uncut & (shorter[1] >= 0)",
        TRITON,
        "interpreter_agrees",
    ),
    Fault("monarch_jax/block_mask.py", "blocks * (1 + shorter[", "blocks * (1 + 0 * shorter[", TRITON, "interpreter_"),
    Fault("monarch_jax/block_mask.py", "np.diff(starts), (0, size)", "np.diff(starts), (0, 1, size)", SPARSE_KERNELS),
    Fault("monarch_jax/block_mask.py", "(ranks <= listed", "(ranks != listed", SPARSE_KERNELS, "too_short"),
    Fault(
        "triton_kernels/sparse.py", "level = tl.where(part >= n_all", "level = tl.where(part > n_all", TRITON, "interp"
    ),
    Fault("triton_kernels/block_sparse.py", "(lengths > begin)", "(lengths >= begin)", TRITON, "interpreter_agrees"),
    Fault("models/attention/listed.py", "_permuted(g, saved[1], saved[0])", "_permuted(g, saved[0], saved[1])", LISTED),
    Fault(
        "models/attention/sliding_tile.py",
        "of_frame = of_frame + (frames < 0) * most",
        "of_frame = of_frame + 0 * most",
        LISTED,
        "wherever_tiles_begin",
    ),
    Fault("models/attention/sliding_tile.py", "+ first % depth) //", "+ 0) //", LISTED, "wherever_tiles_begin"),
    Fault(
        "models/attention/notation.py",
        ' or field.metadata.get("written")',
        "",
        ("tests/models/attention/test_notation.py",),
        "other_ways",
    ),
    Fault("train/run_folder.py", "return str(parse(value))", "return value", COMMANDS, "written_otherwise"),
    Fault("monarch_jax/checks.py", "if abs(factor) > LARGEST_SCALE", "if factor > LARGEST_SCALE", SPEC),
    Fault("models/attention/listed.py", "if x.shape[:2] == (1, 1)", "if x.shape[0] == 1", LISTED, "heads_first"),
    Fault(
        "models/attention/listed.py",
        "return queries.undo(jnp.moveaxis(",
        "return (jnp.moveaxis(",
        LISTED,
        "heads_first",
    ),
    Fault("models/attention/listed.py", "mask.key_starts + first", "mask.key_starts", LISTED, "read_where_they_lie"),
    Fault("models/attention/masked.py", "(layer, jnp.int32) * keys", "(layer, jnp.int32) * 0", LISTED, "read_where"),
    Fault("models/attention/masked.py", "transpose(0, 2, 4, 1, 3, 5)", "ravel()", LISTED, "wherever"),
    Fault("models/attention/vsa.py", "of_key = np.sort(of_key)", "of_key = +of_key", LISTED, "lie_in_the_cache"),
    Fault("triton_kernels/left.py", "d_cl = -tl.sum(d_x, 0)", "d_cl = tl.sum(d_x, 0)", TRITON, "interpreter_agrees"),
    # the networks
    Fault(
        "models/umt5/encoder.py",
        "/ math.log(config.max_distance / exact)",
        "/ math.log(config.max_distance)",
        UMT5,
        "bucket",
    ),
    Fault(
        "models/norms.py",
        "jnp.mean(precise**2, axis=-1, keepdims=True) + eps",
        "jnp.mean(precise**2, axis=-1, keepdims=True)",
        UMT5,
        "small_numbers",
    ),
    Fault("models/wan/activations.py", "3 * _CUBE * y * y", "2 * _CUBE * y * y", ("tests/models/test_activations.py",)),
    Fault(
        "models/norms.py",
        "jnp.mean(precise**2, axis=-1, keepdims=True) + eps",
        "jnp.mean(precise**2, axis=-1, keepdims=True)",
        WAN,
        "small_numbers",
    ),
    Fault("models/wan/layers.py", "project, policy=PRODUCTS", "project", WAN, "gates_in_weights"),
    Fault("models/wan/layers.py", "with_gate(self.ffn.fc2, gate2)", "self.ffn.fc2", WAN, "gates_in_weights"),
    Fault(
        "models/vae/vae.py",
        "return jnp.clip(frames.astype(self.precise_dtype), -1, 1), cache",
        "return frames.astype(self.precise_dtype), cache",
        VAE,
        "clipped",
    ),
    Fault("models/vae/causal.py", "x.shape[-1] ** 0.5", "x.shape[-1]", VAE, "test_encode"),
    Fault("models/vae/causal.py", "y[:, a : a + height,", "y[:, :height,", VAE, "test_decode"),
    Fault("models/vae/layers.py", "self.kernel[-steps:]", "self.kernel[: steps or None]", VAE, "test_decode"),
    Fault(
        "models/vae/vae.py",
        "_norm_of(following), not isinstance",
        "_norm_of(block), not isinstance",
        CONVOLUTION,
        "norms_in",
    ),
    Fault(
        "models/vae/layers.py",
        "[[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]",
        "[[[1, 0, 0], [0, 1, 1]], [[1, 0, 0], [0, 1, 1]]]",
        VAE,
        "test_decode",
    ),
    Fault(
        "pallas_kernels/sm90/convolution.py",
        "jnp.where(row >= segment, 1, 0)",
        "jnp.where(row > segment, 1, 0)",
        CONVOLUTION,
        "is_a_causal",
    ),
    Fault(
        "pallas_kernels/sm90/convolution.py",
        "copy(self.past, frame + STEPS - 1)",
        "copy(self.past, 0 * frame)",
        CONVOLUTION,
        "is_a_causal",
    ),
    Fault(
        "pallas_kernels/sm90/convolution.py",
        "pl.ds(column - 1, config.columns + 2)",
        "pl.ds(column, config.columns + 2)",
        CONVOLUTION,
        "is_a_causal",
    ),
    # sampling and training
    Fault(
        "models/sampling/schedules.py",
        "shift * u / (1 + (shift - 1) * u)",
        "shift * u / (1 + shift * u)",
        SOLVERS,
        "unipc_of_wan",
    ),
    Fault(
        "models/sampling/tables.py",
        "orders = [2 if 0 < n < steps - 1 else 1 for n in range(steps)]",
        "orders = [2 if 0 < n else 1 for n in range(steps)]",
        SOLVERS,
        "dpmpp_equals",
    ),
    Fault(
        "models/sampling/solve.py",
        "return unconditional + guidance * (conditional - unconditional)",
        "return conditional + guidance * (conditional - unconditional)",
        SOLVERS,
        "guidance_is",
    ),
    Fault(
        "models/sampling/bidirectional.py",
        "past = part if context is None else jnp.concatenate([context, part], axis=1)",
        "past = part",
        WINDOWS,
        "all_that_is_finished",
    ),
    Fault(
        "models/sampling/bidirectional.py",
        "given = None if noise is None else noise.part(used, new)",
        "given = None if noise is None else noise.part(done, new)",
        ("tests/models/sampling/test_noise.py",),
        "noise_that_was_taken",
    ),
    Fault("train/state.py", "        mask=kernels,\n", "", STATE, "on_matrices_alone"),
    Fault(
        "train/loop.py",
        "        self.networks.check_finite(state)\n",
        "",
        ("tests/train/test_loop.py",),
        "numbers_that_are_not_finite",
    ),
    Fault(
        "train/loop.py",
        "{whose: of_data, **self.objective.texts()}.items()",
        "{whose: of_data}.items()",
        ("tests/train/test_roles.py",),
        "no_network_takes",
    ),
    Fault(
        "train/pairs.py",
        '            _check_finite(f"latents {path}", text)\n',
        "            pass\n",
        ("tests/train/objectives/test_ode.py",),
        "texts_that_are_not_finite",
    ),
    Fault("train/state.py", "        b2=config.beta2,\n", "", STATE, "adamw"),
    Fault(
        "models/generate/plan.py",
        "                context=config.context,\n                context_noise=config.context_noise,\n",
        "                context=config.context,\n",
        ("tests/models/generate/test_plan.py",),
        "passed_on",
    ),
    Fault("train/state.py", "step <= config.ema_start", "step < config.ema_start", STATE, "average"),
    Fault("train/step.py", "jax.random.fold_in(state.rng, state.step)", "state.rng", STATE, "step_number"),
    Fault(
        "train/objectives/flow.py",
        "jnp.asarray(levels.weight)[level] * errors",
        "errors",
        OBJECTIVE,
        "definition",
    ),
    Fault(
        "train/objectives/consistency.py",
        "shape[:1], 0, self.settings.grid - 1)",
        "shape[:1], 0, self.settings.grid)",
        CONSISTENCY,
        "levels",
    ),
    Fault("train/objectives/self_forcing.py", "if not rolls:  #", "if rolls:  #", ROLL_OUTS, "window"),
    Fault("train/objectives/by_blocks.py", "of_moving, pull_shared(", "zero[1], pull_shared(", ROLL_OUTS, "window"),
    Fault(
        "train/objectives/self_forcing.py",
        "index, in_place=True)",
        "index)",
        DISTILLATION,
        "finished_blocks",
    ),
    Fault(
        "train/objectives/by_blocks.py",
        "(jax.tree.map(jnp.zeros_like, shared), zero)",
        "jax.tree.map(jnp.zeros_like, (shared, moving))",
        DISTILLATION,
        "rounded_once and dense",
    ),
    Fault(
        "train/objectives/adversarial.py", "square((near - there) / sigma)", "square(near - there)", ADVERSARIAL, "flat"
    ),
    Fault("train/step.py", "roles[name].average, frozen_of", "roles[name].params, frozen_of", CONSISTENCY, "average"),
    Fault(
        "train/plan.py",
        "part = _shapes(batch, config.trained(name).accumulation)",
        "part = _shapes(batch, 1)",
        ("tests/train/test_plan.py",),
        "as_json",
    ),
    Fault(
        "train/step.py",
        "jnp.nanmean(leaf, axis=0), extra",
        "jnp.mean(leaf, axis=0), extra",
        ("tests/train/test_state.py",),
        "accumulation_shows",
    ),
    Fault(
        "train/data_settings.py",
        "self.prompts is None or value ==",
        "True or value ==",
        ("tests/train/test_texts.py",),
        "do_not_go_with",
    ),
    Fault("train/duration.py", "share = sum(name in roles for roles in due) / max(1, len(due))", "share = 1", DURATION),
    Fault("train/duration.py", "shapes)[name], objective.turns(name)", "shapes)[name], 1.0", DURATION, "updates_parts"),
    Fault("train/arithmetic.py", ".times(turns)", "", DURATION, "loops"),
    Fault("train/rates.py", "longer * (work.products", "(work.products", DURATION, "data_sheet"),
    Fault("train/watch.py", "value < self._reference", "value > self._reference", WATCH),
    # files: pictures and videos
    Fault("models/media/frames.py", 'interpolation="AREA"', 'interpolation="POINT"', SEEN, "averages"),
    Fault("models/media/decoding.py", 'interpolation="AREA"', 'interpolation="POINT"', SEEN, "averages"),
    Fault("models/media/frames.py", "shape = stored[0], stored[1] * aspect", "shape = stored", SEEN, "not_square"),
    Fault("models/media/frames.py", "begin = frame.time", "begin = 0.0", SEEN, "begins_with"),
    Fault("models/media/frames.py", "frame.time - jitter:", "frame.time + 0.5 / fps:", SEEN, "rate_that_varies"),
    Fault("models/media/colour.py", "_PAPER_WHITE = 203.0", "_PAPER_WHITE = 100.0", SEEN, "hdr"),
    Fault("models/media/colour.py", "linear = linear @ _to_bt709(primaries).T", "pass", SEEN, "wide_gamuts"),
    # files: checkpoints
    Fault("models/checkpoints/names.py", "(?:_orig_mod|_fsdp", "(?:_fsdp", RELATIVES, "wrappers"),
    Fault(
        "models/checkpoints/names.py", '("generator_ema", "ema",', '("generator", "ema",', RELATIVES, "average_of_two"
    ),
    Fault("models/checkpoints/names.py", "elif short.startswith(others):", "elif False:", RELATIVES, "whole_pipeline"),
    Fault(
        "models/checkpoints/scaled.py",
        "* scale.reshape(_rank(scale.shape, shape))",
        "",
        RELATIVES,
        "with_scales",
    ),
    Fault(
        "models/checkpoints/scaled.py",
        "rows, blocks, weight[1] // blocks",
        "rows, weight[1] // blocks, blocks",
        RELATIVES,
        "with_scales",
    ),
    Fault("models/checkpoints/scaled.py", "== mask).any()", "== mask).all()", RELATIVES, "numbers_that_are_none"),
    Fault(
        "models/checkpoints/torch_pickle.py",
        "last >= storage.size",
        "last > storage.size",
        ARCHIVES,
        "past_its_storage",
    ),
    Fault(
        "models/wan/checkpoints/mapping.py",
        '"image_embedding.norm1", "img_emb.proj.0"',
        '"image_embedding.norm1", "img_emb.proj.4"',
        CHECKPOINTS,
        "official_names",
    ),
    # kinds of attention
    Fault("models/attention/schedule.py", "if frames < clip.grid[0]:", "if True:", SCHEDULE, "first_blocks_alone"),
    Fault(
        "models/attention/schedule.py",
        "self.first.for_frames(clip.grid[0])(*early",
        "self.first(*early",
        SCHEDULE,
        "first_blocks_of",
    ),
    Fault(
        "models/attention/radial.py",
        "((f * places.per_frame + p) // block",
        "((f * places.per_frame + p + 1) // block",
        SPARSE,
        "published_blocks",
    ),
    Fault("models/attention/svg.py", "return temporal < spatial", "return temporal > spatial", SPARSE, "svg"),
    Fault("models/attention/svg2.py", "kept = (before <= top_p)", "kept = (before < 0)", SPARSE, "Clusters"),
    Fault(
        "models/attention/vsa.py",
        "(sums / count[None, :, None, None])",
        "(sums / math.prod(self.cube))",
        SPARSE,
        "vsa",
    ),
    Fault("models/attention/sla.py", "1e-5 + jnp.einsum", "1e-2 + jnp.einsum", SPARSE, "sla"),
    Fault("models/attention/vsa.py", "tuple(map(min, self.cube, grid))", "self.cube", SPARSE, "holds_no_more"),
    # sessions
    Fault("models/wan/fp8.py", "1.2 * lengths * norms", "0.02 * lengths * norms", FP8, "bound"),
    Fault("models/wan/fp8.py", "axis=-1) / LARGEST, SMALLEST)", "axis=-1) / 480, SMALLEST)", FP8, "rows_are"),
    Fault("models/checkpoints/torch_legacy.py", "at += 8 + count", "at += count", CHECKPOINTS, "before_1_6"),
    Fault(
        "models/attention/densities.py",
        "*mean(after), mean(settings).visible",
        "*mean(after), mean(after).visible",
        SCHEDULE,
        "network",
    ),
    # what is given
    Fault(
        "train/cli/generate.py",
        '"condition": (None, NO_CONDITION),\n}',
        '"condition": (None, NO_CONDITION),\n    "checkpoint": (None, *DECODERS),\n}',
        STRANGERS,
        "words_that",
    ),
    Fault("monarch_jax/checks.py", "if number > most:", "if number > LARGEST:", COMMANDS, "sizes_beyond"),
    Fault("train/interrupt.py", "        if asked:", "        if False:", INTERRUPT, "import_turns"),
    Fault("train/latent_lmdb.py", "if 2 * self.count > entries:", "if False:", TEXTS, "not_of_latents"),
    *DISTILLING,
    *MEASURED,
    *SERVING,
    *BESIDE_PUBLISHED,
    *BLOCK_SPARSE,
)
