"""`monarchrt serve`: sessions for browsers and programs, with one loaded model."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from monarchrt.models.errors import UserError
from monarchrt.models.files import temporary_folder
from monarchrt.models.generate.config import GenerateConfig, Mode
from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.tables import say
from monarchrt.train.interrupt import finish_first

_SERVE = """Serve sessions: videos that are watched while they are generated, and whose prompt can change meanwhile.

monarchrt serve --checkpoint self_forcing_dmd.pt --components Wan-AI/Wan2.1-T2V-1.3B --tile 3 30 52 --decoder tiny

monarchrt serve --checkpoint runs/demo/monarch

monarchrt serve --checkpoint self_forcing_dmd.pt --components Wan-AI/Wan2.1-T2V-1.3B --host 0.0.0.0 --token "$TOKEN" \\
    --certificate cert.pem --key key.pem"""


@dataclass(frozen=True, kw_only=True)
class VideoOptions(GenerateConfig):
    """The options of generation without those of one video and its page, such as the prompt, which are hidden."""

    lora: tuple[str, ...] = ()
    """LoRAs to merge into the network, FILE or FILE:SCALE, such as `style.safetensors:0.8`, in the format of diffusers,
    ComfyUI or Musubi; or a run folder that trained one."""

    prompt: Annotated[str | None, tyro.conf.Suppress] = None
    out: Annotated[Path, tyro.conf.Suppress] = Path("video.mp4")
    overwrite: Annotated[bool, tyro.conf.Suppress] = False
    save_embeddings: Annotated[Path | None, tyro.conf.Suppress] = None
    frames: Annotated[int | None, tyro.conf.Suppress] = None
    zoom: Annotated[int | None, tyro.conf.Suppress] = None
    seed: Annotated[int, tyro.conf.Suppress] = 0
    condition: Annotated[str | None, tyro.conf.Suppress] = None
    condition_frames: Annotated[int | None, tyro.conf.Suppress] = None
    condition_fps: Annotated[float | None, tyro.conf.Suppress] = None
    mode: Annotated[Mode, tyro.conf.Suppress] = "auto"
    noise: Annotated[Path | None, tyro.conf.Suppress] = None
    save_noise: Annotated[Path | None, tyro.conf.Suppress] = None
    save_latents: Annotated[Path | None, tyro.conf.Suppress] = None
    context: Annotated[int, tyro.conf.Suppress] = 1
    quality: Annotated[int, tyro.conf.Suppress] = 16
    compare_dense: Annotated[bool, tyro.conf.Suppress] = False
    compare: Annotated[str | None, tyro.conf.Suppress] = None
    stream: Annotated[bool, tyro.conf.Suppress] = False
    host: Annotated[str, tyro.conf.Suppress] = "127.0.0.1"
    port: Annotated[int, tyro.conf.Suppress] = 0
    linger: Annotated[float, tyro.conf.Suppress] = 60.0
    quiet: Annotated[bool, tyro.conf.Suppress] = False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(VideoOptions):
    """Serve sessions of a Wan 2.1 checkpoint or a run; docs/serve.md has the protocol."""

    host: str = "127.0.0.1"
    """Address to serve at; other machines need `token`."""

    port: int = 8766
    """Port; 0 takes a free one."""

    token: str | None = None
    """Token of at least 16 characters that clients must send; required to serve other machines."""

    certificate: Path | None = None
    """PEM file of a certificate, for https."""

    key: Path | None = None
    """PEM file of the certificate's key, if it is in another file."""

    webrtc: Literal["auto", "yes", "no"] = "auto"
    """Whether clients may ask for frames over WebRTC. auto: if aiortc is installed (`monarchrt[webrtc]`)."""

    ice_servers: tuple[str, ...] = ()
    """For WebRTC across networks: `stun:HOST:PORT`, and `turn:HOST:PORT` or `turns:HOST:PORT?transport=tcp`. Default:
    none, so no third-party server is contacted."""

    ice_username: str | None = None
    """User name for the TURN server."""

    ice_credential: str | None = None
    """Credential for the TURN server; it is sent to clients."""

    priority: Literal["auto", "normal"] = "auto"
    """Priority on the host's cores. auto: with an accelerator raised to nice -10, where that is permitted."""

    sessions: int = 4
    """Sessions that may generate at the same time; each keeps its own cache of keys and values."""

    waiting: int = 16
    """Sessions that may wait for a free place."""

    seconds: float = 600.0
    """Longest video of a session, in seconds."""

    idle: float = 300.0
    """Seconds without a message after which a session ends."""

    kept: int = 120
    """Blocks of latents kept for each session, for seeking and saving."""

    begin: tuple[int, ...] | None = None
    """Numbers of frames of an uploaded image or clip that sessions may start from; each needs a compiled program. 0:
    none. Default: the frames of the first block."""

    attentions: tuple[str, ...] = ()
    """Further attention settings that sessions may ask for, such as `dense` or `monarch(tile=(1,30,52))`; each needs a
    compiled program."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin is not None:
            object.__setattr__(self, "begin", tuple(self.begin))
            if not self.begin or not all(0 <= frames <= 2**20 for frames in self.begin):
                raise UserError(f"begin is {self.begin}; give numbers of frames, such as 9 21, or 0 for none")
        object.__setattr__(self, "ice_servers", tuple(self.ice_servers))


def serve_command(arguments: Sequence[str]) -> int:
    """`monarchrt serve`."""
    options = parse(ServeOptions, arguments, prog="monarchrt serve", description=_SERVE)
    if options.checkpoint is None:
        raise UserError(
            "no checkpoint was given; give --checkpoint, for example runs/demo/monarch after `monarchrt demo`"
        )
    with finish_first():
        from monarchrt.models.serve.limits import Limits
        from monarchrt.models.serve.load import load_engine
        from monarchrt.models.serve.peers import Ice, installed
        from monarchrt.models.serve.priority import set_priority
        from monarchrt.models.serve.server import Server, run_server
        from monarchrt.models.web.access import Address, check_port

    def of(kind: Any) -> Any:
        names = {field.name for field in dataclasses.fields(kind)} & {
            field.name for field in dataclasses.fields(options)
        }
        return kind(**{name: getattr(options, name) for name in names})

    # everything that needs no weights is checked first
    address = of(Address)
    address.context()
    limits = Limits(**{name: getattr(options, name) for name in ("sessions", "waiting", "seconds", "idle", "kept")})
    ice = Ice(servers=options.ice_servers, username=options.ice_username, credential=options.ice_credential)
    _check_webrtc(options)
    check_port(address.host, address.port)
    _check_temporary_folder()
    begin = time.monotonic()
    begins = None if options.begin is None else [frames for frames in options.begin if frames]
    engine = load_engine(
        of(GenerateConfig), unroll=options.unroll, report=say, begins=begins, attentions=options.attentions
    )
    engine.check_memory(limits.sessions)
    say("compiling")
    engine.warm_up()
    offered = ice if options.webrtc != "no" and installed() else None
    server = Server(engine, address=address, limits=limits, title=Path(options.checkpoint).name, ice=offered)
    server.listening = lambda: say(
        f"ready after {time.monotonic() - begin:.1f} s at {server.url}"
        + ("?token=..., with the token of --token" if address.token else "")
    )
    set_priority(options.priority, say)
    run_server(server)
    say("stopped; all sessions are ended")
    return 0


def _check_webrtc(options: ServeOptions) -> None:
    """Raises UserError if WebRTC is asked for where it cannot be had, or refused and configured."""
    from monarchrt.models.serve.peers import INSTALL, installed

    if options.webrtc == "no" and options.ice_servers:
        raise UserError(f"ice_servers is {' '.join(options.ice_servers)}, but webrtc is no; leave one of them out")
    if (options.webrtc == "yes" or options.ice_servers) and not installed():
        raise UserError(f"WebRTC was asked for, but {INSTALL}")


def _check_temporary_folder() -> None:
    """Raises UserError if uploads and saved videos could not be stored."""
    try:
        with temporary_folder():
            pass
    except OSError as error:
        raise UserError(
            f"no folder can be created for uploads and saved videos ({error}); set TMPDIR to a writable folder"
        ) from error
