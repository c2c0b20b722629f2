"""Watching videos in a browser: the page, its server and access rules, and the encodings of frames."""

from monarchrt.models.web.access import Address, check_port
from monarchrt.models.web.encodings import ENCODINGS, Encoding
from monarchrt.models.web.server import Client, WebServer

__all__ = ["ENCODINGS", "Address", "Client", "Encoding", "WebServer", "check_port"]
