"""Tables for the terminal that read well in 80 columns and through a pipe: no frame, and what is too long is folded,
never cut off."""

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

Block = Sequence[Sequence[str]]
"""Rows, the cells of each in the order of the columns."""


def table(title: str, columns: Sequence[str], *blocks: Block, left: Sequence[str] = ()) -> Group:
    """Columns are right-justified but for the first and those in `left`; between blocks of rows there is a line. The
    title is as wide as the terminal, not as the table."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    for number, name in enumerate(columns):
        shown.add_column(Text(name), justify="left" if number == 0 or name in left else "right", overflow="fold")
    for block in blocks:
        for cells in block:
            shown.add_row(*map(Text, cells))
        shown.add_section()
    return Group(Text(title, style="italic"), shown, Text())
