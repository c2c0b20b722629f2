"""Output of commands: tables on standard output, messages on standard error."""

import sys
from collections.abc import Sequence

UNCUT = 10_000  # columns, more than any row has


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table to standard output; its rows are cut to the width of a terminal, and to none elsewhere."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNCUT
    console.print(table)


def say(line: str) -> None:
    """Prints a line to standard error."""
    print(line, file=sys.stderr)
