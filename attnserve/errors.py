"""What the commands refuse."""

from __future__ import annotations


class UserError(ValueError):
    """One line for the user: what is wrong, and what to do."""
