"""The command madtp: options, tables and messages. What the commands do is in the rooms they call."""

from madtp.cli.app import main

__all__ = ["main"]
