"""Where a server listens, and who may come: names, origins, tokens, TLS."""

import contextlib
import errno
import hmac
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from monarchrt.models.errors import UserError

SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and who may come.

    Examples:
        >>> Address(port=80).url, Address(host="::1", port=0).at(8766).url
        ('http://127.0.0.1:80/', 'http://[::1]:8766/')

    Attributes:
        host: Address to listen on.
        port: 0 takes a free one.
        token: That clients must have; needed beyond this machine, unless they can only watch.
        certificate: PEM file for TLS.
        key: Of the certificate, if it is in another file.
        watch_only: Clients can do nothing but watch.

    Raises:
        UserError: If it can be reached from other machines, and there is no token.
    """

    host: str = "127.0.0.1"
    port: int = 8766
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    watch_only: bool = False

    def __post_init__(self):
        if not self.watch_only and not is_loopback(self.host) and not self.token:
            raise UserError(
                f"host {self.host} can be reached from other machines; give a --token that clients must have"
            )
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise UserError(f"token has {len(self.token)} characters; give at least {SHORTEST_TOKEN}")
        for name in ("certificate", "key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise UserError(f"{name} {path} is not a file; give a PEM file")
        if self.key is not None and self.certificate is None:
            raise UserError(f"key {self.key} has no effect without a certificate; give --certificate too")

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.certificate else ''}://{host}:{self.port}/"

    def at(self, port: int) -> "Address":
        """The same with the port that was free."""
        same = dict(host=self.host, token=self.token, certificate=self.certificate, key=self.key)
        return Address(port=port, watch_only=self.watch_only, **same)  # type: ignore[arg-type]

    def context(self) -> ssl.SSLContext | None:
        """For TLS; None without a certificate."""
        if self.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            raise UserError(f"certificate {self.certificate} cannot be used ({error}); give a PEM file") from error
        return context

    def admits(self, given: str) -> bool:
        """Whether a token is the right one, in a time that does not tell how much of it is."""
        return hmac.compare_digest(given.encode(errors="replace"), (self.token or "").encode())


def check_port(host: str, port: int) -> None:
    """Raises UserError unless the address can be listened on; before anything is computed."""
    try:
        socket.getaddrinfo(host or None, port)  # an unknown name has an error of its own here, and not below
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise refused(host, port, error) from error


def refused(host: str, port: int, error: OSError) -> UserError:
    """What is wrong, and with which of the two."""
    name = isinstance(error, socket.gaierror)
    # the text of other errors repeats the address, as Python writes it
    reason = error.strerror if name or error.errno is None else os.strerror(error.errno)
    if name or error.errno == errno.EADDRNOTAVAIL:
        return UserError(
            f"host {host} cannot be listened on ({reason or error}); give an address of this machine, such as 127.0.0.1"
        )
    return UserError(
        f"port {port} of {host} cannot be listened on ({reason or error}); give another --port, or 0 for a free one"
    )


def own_host(named: str | None, host: str) -> bool:
    """Whether a request's Host header names this page: no name that another could have pointed at this machine.

    Examples:
        >>> own_host("localhost:8765", "127.0.0.1"), own_host("rebound.example:8765", "127.0.0.1")
        (True, False)

    Args:
        named: The header.
        host: What the page listens on. Beyond this machine, it may be called by any address, or by the machine's name.
    """
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{named or ''}").hostname or ""
        local = {"localhost", "127.0.0.1", "::1", host.lower()} - {""}
        beyond = not is_loopback(host)
        return name in local or is_loopback(name) or (beyond and (_is_address(name) or name in _machine_names()))
    return False


def own_origin(origin: str | None, named: str | None) -> bool:
    """Whether a request comes from the page itself, or from no page at all.

    Examples:
        >>> own_origin("http://127.0.0.1:8765", "127.0.0.1:8765"), own_origin("https://a.example", "127.0.0.1:8765")
        (True, False)

    Args:
        origin: The Origin header, which every browser sends with a websocket.
        named: The Host header.
    """
    if origin is None:
        return True
    scheme, _, rest = origin.lower().partition("://")
    return scheme in ("http", "https") and rest == (named or "").lower()


def is_loopback(name: str) -> bool:
    """Whether only this machine can reach a name or address."""
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _machine_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local", name.partition(".")[0]}
