"""Exceptions: an error of the program that is run, or an instruction that the runner lacks."""

from __future__ import annotations


class Fault(Exception):
    """The program does something that a kernel must not do."""


class Unknown(Exception):
    """The program has something that is not implemented here."""
