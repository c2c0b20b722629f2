"""Where a server listens, and which requests it accepts: host names, origins, tokens, TLS."""

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
    """Where a server listens, and who may connect.

    Examples:
        >>> Address(port=80).url, Address(host="::1", port=0).at(8766).url
        ('http://127.0.0.1:80/', 'http://[::1]:8766/')

    Attributes:
        host: Address to listen on.
        port: TCP port; 0 for a free one.
        token: Secret of 16 characters or more that clients must send. Required if `host` can be reached from other
            machines, unless `watch_only`.
        certificate: PEM file for TLS; None for no TLS.
        key: PEM file with the certificate's key, if it is not in the same file.
        watch_only: Whether clients can only watch.

    Raises:
        UserError: If a required token is missing, the token is too short, or a file does not exist.
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
        """URL of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.certificate else ''}://{host}:{self.port}/"

    def at(self, port: int) -> "Address":
        """The same address with another port, such as the free one that was chosen."""
        same = dict(host=self.host, token=self.token, certificate=self.certificate, key=self.key)
        return Address(port=port, watch_only=self.watch_only, **same)  # type: ignore[arg-type]

    def context(self) -> ssl.SSLContext | None:
        """The TLS context; None without a certificate.

        Raises:
            UserError: If the certificate or its key cannot be used.
        """
        if self.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            raise UserError(f"certificate {self.certificate} cannot be used ({error}); give a PEM file") from error
        return context

    def admits(self, given: str) -> bool:
        """Whether a token is the right one; compared in constant time."""
        return hmac.compare_digest(given.encode(errors="replace"), (self.token or "").encode())


def check_port(host: str, port: int) -> None:
    """Raises UserError unless the address can be listened on, for a check before anything is computed."""
    try:
        socket.getaddrinfo(host or None, port)  # raises gaierror for an unknown name
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise refused(host, port, error) from error


def refused(host: str, port: int, error: OSError) -> UserError:
    """The error for an address that cannot be listened on: says whether the host or the port is the reason."""
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
    """Whether a request's Host header names this server, as protection against DNS rebinding.

    Examples:
        >>> own_host("localhost:8765", "127.0.0.1"), own_host("rebound.example:8765", "127.0.0.1")
        (True, False)

    Args:
        named: The Host header.
        host: Address that the server listens on. If other machines can reach it, any IP address and the machine's name
            are accepted too.
    """
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{named or ''}").hostname or ""
        local = {"localhost", "127.0.0.1", "::1", host.lower()} - {""}
        beyond = not is_loopback(host)
        return name in local or is_loopback(name) or (beyond and (_is_address(name) or name in _machine_names()))
    return False


def own_origin(origin: str | None, named: str | None) -> bool:
    """Whether a request comes from the server's own page or from outside of a browser, not from another site.

    Examples:
        >>> own_origin("http://127.0.0.1:8765", "127.0.0.1:8765"), own_origin("https://a.example", "127.0.0.1:8765")
        (True, False)

    Args:
        origin: The Origin header, which browsers send with every websocket; None if there is none.
        named: The Host header.
    """
    if origin is None:
        return True
    scheme, _, rest = origin.lower().partition("://")
    return scheme in ("http", "https") and rest == (named or "").lower()


def is_loopback(name: str) -> bool:
    """Whether a name or address is a loopback address, which only this machine can reach."""
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _machine_names() -> set[str]:
    """Names of this machine: in full, in its local network, and without the domain."""
    name = socket.gethostname().lower()
    return {name, f"{name}.local", name.partition(".")[0]}
