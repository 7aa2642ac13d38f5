"""Errors a user can act on."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names the argument, what was given, what is expected and what to do."""


class CertificationError(RuntimeError):
    """A derivative of the model is wrong or missing; the message names the layer."""
