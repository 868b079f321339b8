"""What a terminal of 80 columns or more shows of an evaluation: bars while it goes, then its figures in tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from granvit.errors import printable
from granvit.eval.metrics import is_attribute, is_of_size
from granvit.eval.names import FLOORS, KINDS, METRICS, figure_name
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

SOURCES = 5  # that the tables show, of the hundreds that a data set may have
LONGEST = 48  # letters of a source's name that they show
COLUMNS = FLOORS | {"other image": "another image"}
ORDER = [word for words in METRICS for word in words.split(", ")]  # the glossary's

Figures = Mapping[str, float]


@contextmanager
def bars(shown: bool) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Inside, bar(title) adds a progress bar on the error stream, if that is a terminal, and returns what is to be told
    how much is done, and of how much. They go when all is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:

        def bar(title: str) -> Callable[[int, int], None]:
            task = progress.add_task(title, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


def print_figures(
    console: Console, columns: Mapping[str, Figures], asked: Mapping[str, int], file: str | None = None
) -> None:
    """Tables of captions, attributes, boxes, and boxes by size. columns: {"model": its figures, of a control or floor:
    its}; asked: `metrics.counts`; file: where all figures are written, if they are."""
    names = columns["model"].keys()
    sizes = [name for name in names if is_of_size(name)]
    attributes = [name for name in names if is_attribute(name)]
    boxes = [name for name in names if CAPTION2BBOX in name.rpartition("/")[2] and name not in sizes]
    captions = [name for name in names if name not in {*sizes, *attributes, *boxes}]
    shown, hidden = frequent_sources(asked)
    for title, task, rows in (
        ("Captions of boxes (per cent; CIDEr as it is, 10 at most)", BBOX2CAPTION, captions),
        ("Attributes that captions name right (per cent)", None, attributes),
        ("Boxes of sentences (per cent)", CAPTION2BBOX, boxes),
        ("Boxes by the object's size (per cent)", None, [name for name in sizes if "/" not in name]),
    ):
        if rows:
            counts = {} if task is None else {name.removesuffix(task): n for name, n in asked.items()}
            console.print(table(title, rows, columns, shown, counts), "")
    if hidden:
        most = max(hidden.values())
        console.print(
            f"and {len(hidden):,} more sources of {sum(hidden.values()):,} questions, {most:,} or fewer each: "
            + (f"all are in {file}" if file else "--json FILE writes all of them"),
            soft_wrap=True,
        )


def frequent_sources(asked: Mapping[str, int]) -> tuple[list[str], Counter[str]]:
    """The sources that most questions are about, at most SOURCES, the most frequent first; and the rest, each with its
    number of questions. asked: see `metrics.counts`."""
    total: Counter[str] = Counter()
    for name, number in asked.items():
        if "/" in name:
            total[name.rpartition("/")[0]] += number
    shown = [source for source, _ in total.most_common(SOURCES)]
    return shown, Counter({source: n for source, n in total.items() if source not in shown})


def table(
    title: str,
    figures: Iterable[str],
    columns: Mapping[str, Figures],
    sources: Iterable[str],
    counts: Mapping[str, int],
) -> Table:
    """Figures down, over all, by kind of region and of these sources, in this order; the model and what it is to be
    compared with across. counts: questions of each, by the prefix of its figures."""
    figures = sorted(figures, key=lambda figure: _place(figure_name(figure)[1]))
    columns = {label: column for label, column in columns.items() if column.keys() & set(figures)}
    out = Table(title=Text(title), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    out.add_column("", min_width=max(len(figure_name(figure)[1]) for figure in figures) + 2, overflow="fold")
    for label, column in columns.items():
        words = COLUMNS.get(label, label)
        style = "bold" if label == "model" else "dim"
        width = max(5, *map(len, words.split()), *(len(_cell(figure, column)) for figure in figures))
        out.add_column(Text(words), justify="right", style=style, width=width)
    for prefix in ("", *(f"{kind}_" for kind in KINDS if kind), *(f"{source}/" for source in sources)):
        own = [figure for figure in figures if _prefix(figure) == prefix]
        if own:
            out.add_row(Text(_heading(figure_name(own[0])[0], counts.get(prefix)), "bold"))
        for figure in own:
            out.add_row(Text(f"  {figure_name(figure)[1]}"), *(_cell(figure, column) for column in columns.values()))
    return out


def _cell(figure: str, column: Figures) -> str:
    if figure not in column:
        return ""
    return f"{column[figure]:.2f}" if figure.endswith("cider") else f"{100 * column[figure]:.1f}"


def _place(word: str) -> list[int]:
    return [ORDER.index(part) if part in ORDER else len(ORDER) for part in word.split(", ")]


def _prefix(figure: str) -> str:
    """What stands before the task in a figure's name, as `metrics.summarise` writes it."""
    source, slash, name = figure.rpartition("/")
    return source + slash or next((f"{kind}_" for kind in KINDS if kind and name.startswith(f"{kind}_")), "")


def _heading(of: str, number: int | None) -> str:
    of = printable(of)
    if len(of) > LONGEST:  # long names often begin alike
        of = f"{of[: LONGEST // 2 - 1]}…{of[-LONGEST // 2 :]}"
    return of if number is None else f"{of}: {number:,}"
