"""Watching videos over the network: one page, one server and its rules, and the ways in which frames go out."""

from monarchrt.models.web.access import Address, check_port
from monarchrt.models.web.encodings import ENCODINGS, Encoding
from monarchrt.models.web.server import Client, WebServer

__all__ = ["ENCODINGS", "Address", "Client", "Encoding", "WebServer", "check_port"]
