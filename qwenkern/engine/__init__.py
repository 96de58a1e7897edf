"""The engine: requests, their scheduling, the forward pass, and the results that a caller gets."""

from .completion import Completion, Score, Stream
from .engine import Engine, Output
from .request import Request
from .runner import Runner
from .scheduler import Limits

__all__ = ["Completion", "Engine", "Limits", "Output", "Request", "Runner", "Score", "Stream"]
