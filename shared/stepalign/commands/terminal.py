"""What commands print on: a terminal that no text can steer, and tables that never cut a name.

A :class:`Table` takes the widest of these forms that the terminal has room for: boxed, boxed with cells wrapped between
words, without its box, and at last a record a row, with a line for each column. A word, as the name of an arm, stays in
one piece in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from stepalign.commands.printable import printable


class Terminal(Console):
    """Standard output, or standard error. Square brackets and colons in a text are no markup."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


@dataclass(frozen=True)
class _Column:
    heading: Text
    number: bool
    """At the right, and never wrapped."""
    cells: list[Text]

    @property
    def natural(self) -> int:
        """Cells of width in which every line fits."""
        return max(_longest(each.plain.splitlines()) for each in (self.heading, *self.cells))

    @property
    def least(self) -> int:
        """Cells of width in which every word fits, and every line of a number."""
        return max(
            _longest(self.heading.plain.split()),
            *(_longest(cell.plain.splitlines() if self.number else cell.plain.split()) for cell in self.cells),
        )


@dataclass(frozen=True)
class _Form:
    """A form with columns: the width of its frame, without the columns, and its looks."""

    compact: bool

    def frame(self, columns: int) -> int:
        return 2 * columns - 1 if self.compact else 3 * columns + 1

    def table(self) -> RichTable:
        return RichTable(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0)) if self.compact else RichTable()


_BOXED, _COMPACT = _Form(compact=False), _Form(compact=True)


@dataclass
class Table:
    """Texts in rows and columns. A cell may be a :class:`rich.text.Text` with styles; what it says is not trusted."""

    title: str
    caption: str | Text | None = None
    compact: bool = False
    """Never boxed."""
    rows: list[list[Text]] = field(default_factory=list[list[Text]])
    _headings: list[tuple[Text, bool]] = field(default_factory=list[tuple[Text, bool]])
    _sections: set[int] = field(default_factory=set[int])

    def add_column(self, heading: str, *, number: bool = False) -> None:
        """``heading`` may have line breaks. Numbers stand at the right."""
        self._headings.append((Text(heading), number))

    def add_row(self, *cells: str | Text) -> None:
        self.rows.append([_cell(cell) for cell in cells])

    def add_section(self) -> None:
        """Draw a line under the rows so far."""
        self._sections.add(len(self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        headings = enumerate(self._headings)
        columns = [_Column(heading, number, [row[at] for row in self.rows]) for at, (heading, number) in headings]
        for form in [_COMPACT] if self.compact else [_BOXED, _COMPACT]:
            widths = _fitted(columns, options.max_width - form.frame(len(columns)))
            if widths is not None:
                yield self._in_columns(form.table(), columns, widths, options.max_width)
                return
        yield from self._as_records(columns, options.max_width)

    @property
    def _title(self) -> Text:
        return _in_style(self.title, "table.title")

    @property
    def _caption(self) -> Text | None:
        return None if self.caption is None else _in_style(self.caption, "table.caption")

    def _in_columns(self, table: RichTable, columns: list[_Column], widths: list[int], room: int) -> RichTable:
        table.title, table.caption = self._title, self._caption
        # They are wrapped at the table's width.
        table.min_width = min(room, _longest(f"{table.title} {table.caption or ''}".split()))
        for column, width in zip(columns, widths, strict=True):
            justify = "right" if column.number else "left"
            table.add_column(column.heading, justify=justify, width=width, overflow="fold")
        for at, row in enumerate(self.rows, start=1):
            table.add_row(*row, end_section=at in self._sections)
        return table

    def _as_records(self, columns: list[_Column], room: int) -> RenderResult:
        """The first column heads each record. A cell without a text is left out."""
        yield self._title
        named = [" ".join(column.heading.plain.replace("-\n", "").split()) for column in columns]
        width = min(_longest(named[1:]), room // 2)
        for row in self.rows:
            yield Text(f"{named[0]}: {row[0]}" if named[0] else row[0].plain, style="bold")
            record = RichTable.grid(padding=(0, 2, 0, 0))
            record.add_column(width=width, overflow="fold")
            record.add_column(overflow="fold")
            for name, cell in zip(named[1:], row[1:], strict=True):
                if cell.plain:
                    record.add_row(name, cell)
            yield Padding(record, (0, 0, 0, 2))
        if self._caption is not None:
            yield self._caption


def _cell(said: str | Text) -> Text:
    """A copy on one line, without what would steer the terminal. Styles keep their places: the length stays."""
    if isinstance(said, str):
        return Text(printable(said).replace("\n", " "))
    cell = said.copy()
    cell.plain = printable(cell.plain).replace("\n", " ")
    return cell


def _in_style(said: str | Text, style: str) -> Text:
    text = _cell(said)
    text.stylize_before(style)
    return text


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _fitted(columns: list[_Column], room: int) -> list[int] | None:
    """The width of each column; wide columns at the right are wrapped first. None when a word would be cut."""
    left = room - sum(column.least for column in columns)
    if left < 0:
        return None
    widths: list[int] = []
    for column in columns:
        more = min(left, column.natural - column.least)
        widths.append(column.least + more)
        left -= more
    return widths
