"""Write tables in Markdown, and the numbers in them."""

from collections.abc import Sequence

LEFT, RIGHT = "---", "---:"  # what stands under a column's title, by the side that it is aligned to


def markdown_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], alignment: Sequence[str] | None = None
) -> str:
    """Write a table of Markdown; without an alignment its first two columns are text, and the others numbers."""
    if alignment is None:
        alignment = [LEFT if place < 2 else RIGHT for place in range(len(header))]
    rule = f"|{'|'.join(alignment)}|"
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def or_dash(value: float | None, form: str) -> str:
    """Format a number, or write a dash where it is not known."""
    return "–" if value is None else format(value, form)


def rounded(value: float | None) -> str:
    """Write a number with three significant digits, from 100 on as a whole one, or a dash where it is not known."""
    return or_dash(value, ".3g" if value is None or abs(value) < 100 else ",.0f")
