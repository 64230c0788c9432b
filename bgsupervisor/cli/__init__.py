"""The command line: arguments in, text and exit code out."""

from bgsupervisor.cli.program import main

__all__ = ["main"]
