"""What can go wrong, by whose fault. Every message names the file, tensor or argument, what was found and what was
expected."""

from __future__ import annotations


class Error(Exception):
    """Base of every error that qwenkern raises on purpose."""


class CheckpointError(Error):
    """A file of weights, a tokenizer or a download is missing, damaged or not what it says it is."""


class ConfigError(Error):
    """A model's configuration is incomplete, contradicts itself, or asks for something that is not built."""


class RequestError(Error, ValueError):
    """An argument of a call is out of range: a prompt, a sampling parameter, a device."""
