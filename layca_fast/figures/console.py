"""Tables on the terminal: rich where it is installed, aligned text where it is not."""

from collections.abc import Sequence

from ..messages import aligned


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table. Machines that only have torch (a GPU server, say) get it as plain text."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        print(aligned(columns, rows))
        return
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
