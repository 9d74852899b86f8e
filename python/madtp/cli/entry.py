# SPDX-License-Identifier: Apache-2.0
"""`main`: runs the command line. What is wrong is one line on stderr and exit code 2; an interrupt is 130."""

from __future__ import annotations

import sys

from madtp.missing import OURS, package_needed

# Option -> the one that took its place, where that is the same for all commands.
RENAMED = {"--flops": "--macs", "--output": "--out", "--model": "the first argument, MODEL"}
RENAMED_OF = {("pareto", "--flops"): "--reductions"}  # (command, option) -> the same


def main() -> None:
    """The entry point of the command madtp."""
    arguments = sys.argv[1:]
    try:
        refuse_renamed(arguments)
        from madtp.cli.app import app

        app(prog_name="madtp")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            command = arguments[:1] if arguments and not arguments[0].startswith("-") else []
            error = package_needed(error, " ".join(["madtp", *command]))
        if not is_for_users(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def refuse_renamed(arguments: list[str]) -> None:
    """Raises ValueError where an option has another name now."""
    for argument in arguments[1:]:
        option = argument.partition("=")[0]
        new = RENAMED_OF.get((arguments[0], option)) or RENAMED.get(option)
        if new is not None:
            raise ValueError(f"{option} is now called {new}" if new.startswith("--") else f"{option} is now {new}")


def is_for_users(error: Exception) -> bool:
    """Whether the message says all there is to say: errors of our own classes, and those of wrong values and files."""
    ours = type(error).__module__.partition(".")[0] in OURS
    needs_package = isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError)
    return ours or needs_package or isinstance(error, ValueError | OSError)
