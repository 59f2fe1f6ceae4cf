"""What every part of attnserve shares."""

__version__ = "0.1.0"
