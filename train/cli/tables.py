"""What commands print: tables on stdout, lines for people on stderr."""

import sys
from collections.abc import Sequence

UNCUT = 10_000  # columns


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; where there is no terminal, its rows are not cut."""
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
    """Prints a line to stderr."""
    print(line, file=sys.stderr)
