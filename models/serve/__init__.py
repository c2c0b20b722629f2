"""Sessions: videos whose prompt can change while they are generated, for several clients of one loaded model."""

from monarchrt.models.serve.engine import Engine
from monarchrt.models.serve.limits import Limits
from monarchrt.models.serve.messages import MESSAGES, Refusal, parse_message
from monarchrt.models.serve.outbox import Outbox
from monarchrt.models.serve.server import Server, run_server
from monarchrt.models.serve.session import Session
from monarchrt.models.serve.sessions import Sessions
from monarchrt.models.web.access import Address

__all__ = [
    "MESSAGES",
    "Address",
    "Engine",
    "Limits",
    "Outbox",
    "Refusal",
    "Server",
    "Session",
    "Sessions",
    "parse_message",
    "run_server",
]
