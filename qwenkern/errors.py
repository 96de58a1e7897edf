"""The errors of qwenkern. Every message names the file, tensor or argument, what was found and what was expected."""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """Base of every error that qwenkern raises on purpose."""


class CheckpointError(Error):
    """A weight file, a tokenizer or a download is missing, damaged, or not what its name says."""


class ConfigError(Error):
    """A model's configuration is incomplete, contradicts itself, or asks for something that is not supported."""


class NonFiniteError(Error, ArithmeticError):
    """A model computed logits that are not finite: its dtype overflows, or its weights are damaged."""

    @classmethod
    def at(cls, position: int, dtype: object, where: str) -> NonFiniteError:
        """position: of the last token read, from 0. where: the sequence, for the message."""
        name = str(dtype).removeprefix("torch.")
        wider = "dtype='bfloat16' or 'float32'" if name == "float16" else "dtype='float32'"
        return cls(
            f"{where}: the logits after position {position} are not finite (NaN or infinite), computed in {name}: "
            + (f"try {wider}; if that does not help, " if name != "float32" else "")
            + "the weights are damaged: expected finite numbers in every tensor of the checkpoint"
        )


class EngineError(Error, RuntimeError):
    """A forward pass failed, the engine has stopped, or the machine is too busy: the message has the reason."""

    def again(self) -> EngineError:
        """A copy of the error for another caller: raising an error adds to its traceback, so callers cannot share."""
        copy = EngineError(*self.args)
        copy.__cause__ = self.__cause__
        return copy


class RequestError(Error, ValueError):
    """An argument of a call is out of range: a prompt, a sampling parameter, a device."""


def shown(value: Any, length: int = 80) -> str:
    """The repr of a value for a message, shortened. It also works for numbers with more digits than Python prints."""
    try:
        text = repr(value)
    except Exception as fault:  # more than 4,300 digits, deep nesting, or an error in the caller's class
        text = f"a {type(value).__name__} that cannot be written: {type(fault).__name__}: {fault}"
    return text if len(text) <= length else text[: length - 3] + "..."
