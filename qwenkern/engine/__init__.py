"""The engine: requests, their scheduling, the forward pass, and the results for callers."""

from .completion import AsyncStream, Completion, Score, Stream
from .engine import Engine, Output
from .loop import AsyncCall, Call, Loop
from .request import Request
from .runner import Runner
from .scheduler import Limits

__all__ = [
    "AsyncCall",
    "AsyncStream",
    "Call",
    "Completion",
    "Engine",
    "Limits",
    "Loop",
    "Output",
    "Request",
    "Runner",
    "Score",
    "Stream",
]
