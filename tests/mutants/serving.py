"""Faults of the server: sessions, what it sends and to whom."""

from tests.mutants.fault import Fault

SESSIONS = tuple(f"tests/models/serve/test_{name}.py" for name in ("session", "session_faults", "engine"))
LIVE = ("tests/models/sampling/test_live.py",)
PEERS = ("tests/models/serve/test_peers.py",)
ENCODINGS = ("tests/models/web/test_encodings.py",)

WRITER = ("tests/models/media/test_writer.py",)
SAVING = ("tests/models/serve/test_saving_after_the_end.py",)
PIPELINE = ("tests/models/generate/test_pipeline.py",)
COMMAND = ("tests/train/test_serve.py",)
SERVER = ("tests/models/serve/test_server.py",)

BENCH = ("tests/models/serve/test_bench.py",)
TEMPORARY = ("tests/models/test_files.py",)

SERVING = (
    Fault("train/cli/bench.py", "        raise stopped\n", "        pass\n", COMMAND, "is_stopped"),
    Fault("models/serve/bench.py", "if len(arrivals) > 2:", "if arrivals:", BENCH, "stopped"),
    Fault("models/files.py", "or found.st_uid != os.geteuid()", "", TEMPORARY, "Temporary"),
    Fault("models/files.py", "_lock(descriptor)\n        yield folder", "yield folder", TEMPORARY, "Temporary"),
    Fault("train/cli/compile_cache.py", ".free < LEAST_FREE", ".free < 0", COMMAND, "almost_full"),
    Fault("train/cli/compile_cache.py", "and found.st_mtime < old", "", COMMAND, "almost_full"),
    Fault("models/web/server.py", "HttpProcessingError | ConnectionError", "HttpProcessingError", SERVER, "broken_off"),
    Fault("models/serve/session.py", '"stopped", "idle")', '"stopped")', SAVING, "nothing_is_heard"),
    Fault("models/generate/decoders.py", "jax.Array) and not on_cpu(array)", "jax.Array)", PIPELINE, "may_end"),
    Fault(
        "models/serve/session.py",
        "        while self._commands:\n            message",
        "        while False:\n            message",
        SAVING,
        "late",
    ),
    Fault("models/serve/sessions.py", "key=lambda session: session.ended_at)", "key=lambda session: 0)", SAVING),
    Fault(
        "models/serve/sessions.py", "self._waiting and self.active <", "self._waiting and len(self._active) <", SAVING
    ),
    Fault("models/media/writer.py", "        if self._failed:\n", "        if False:\n", WRITER, "first_byte"),
    Fault("models/serve/uploads.py", "disk_full_reason(error)) is None", "None) is None", SERVER, "full"),
    Fault("models/serve/engine.py", "        video.count_anew()\n", "", SESSIONS, "long_stream"),
    Fault("models/serve/bench.py", "    video.count_anew()  #", "    #", SESSIONS, "long_stream"),
    Fault("models/web/server.py", "heard = max(heard, now) + 1 / MESSAGES", "heard = now", SERVER, "very_much"),
    Fault("models/web/server.py", "compress=False, ", "", SERVER, "compressed_again"),
    Fault(
        "models/serve/session.py",
        "if self.ended is not None:  # by an error in the previous block",
        "if False:",
        SESSIONS,
        "while_its_next",
    ),
    Fault("models/sampling/rollout.py", "if number == 0 and meanwhile", "if meanwhile", LIVE, "meanwhile"),
    Fault(
        "models/serve/engine.py",
        "self._negative if negative is None else negative",
        "negative or self._negative",
        SESSIONS,
        "may_be_empty",
    ),
    Fault(
        "models/serve/session.py",
        "for index in range(0, len(pictures), size)",
        "for index in range(0, len(pictures), 1)",
        SESSIONS,
        "pieces_are",
    ),
    Fault(
        "models/serve/session.py", "video.write(jnp.asarray(given))", "video.generate()", SESSIONS, "goes_on_from_it"
    ),
    Fault(
        "models/serve/engine.py",
        "self.networks[self.attention(attention)]",
        "next(iter(self.networks.values()))",
        SESSIONS,
        "has_its_own",
    ),
    Fault(
        "models/serve/outbox.py",
        "self._waiting + frames > self._limit",
        "self._waiting >= self._limit",
        SESSIONS,
        "still_encoded",
    ),
    Fault("models/web/encodings.py", "int(index * ticks / rate)", "int(index / rate)", ENCODINGS, "knows_its_time"),
    Fault(
        "models/serve/session.py",
        "range(self.block - WARMED, self.block)",
        "range(self.block, self.block)",
        SESSIONS,
        "sees_again",
    ),
    Fault(
        "models/serve/sessions.py",
        "self.finish(None if begun is None else (due[0], begun))",
        "self.finish(None if begun is None else (due[0], begun)); self.finish()",
        SESSIONS,
        "is_under_way",
    ),
    Fault(
        "models/serve/session.py",
        "engine, self.heard = self._engine, self._clock()",
        "engine = self._engine",
        SESSIONS,
        "had_to_wait",
    ),
    Fault("models/serve/session.py", "if isinstance(message, Prompt | Seek)", "if False", SESSIONS, "keep_nobody"),
    Fault(
        "models/serve/peers.py",
        "0 if is_loopback(host) else MOST_CANDIDATES",
        "MOST_CANDIDATES",
        PEERS,
        "what_is_tried",
    ),
    Fault("models/serve/peers.py", "_addresses(self._host)", "None", PEERS, "only_the_address"),
)
