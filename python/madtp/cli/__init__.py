# SPDX-License-Identifier: Apache-2.0
"""The command madtp: options, tables and messages, a file for each group of commands.

What the commands do is in the rooms they call, which are imported when a command runs, so that --help is quick.
"""

from madtp.cli.entry import main

__all__ = ["main"]
