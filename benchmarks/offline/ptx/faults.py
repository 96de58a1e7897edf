"""What goes wrong: in the program that is run, or because it cannot be run here."""

from __future__ import annotations


class Fault(Exception):
    """The program does what a kernel must not do."""


class Unknown(Exception):
    """The program has something that is not implemented here."""
