# SPDX-License-Identifier: Apache-2.0
"""The commands of madtp, in the order in which they are shown."""

import typer

from madtp.cli import budgets, compress, demo, embed, inspect

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress vision-language models: fewer tokens and 2:4 weights, trained jointly.",
)
for command in (
    demo.demo,
    compress.compress,
    budgets.allocate,
    budgets.pareto,
    inspect.evaluate,
    inspect.profile,
    inspect.visualize,
    embed.embed,
    inspect.env,
):
    app.command()(command)
