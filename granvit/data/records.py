"""Where a dataset's pictures come from, and what is noted of them on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.data.schema import FEATURES
from granvit.questions.schema import DataFault


@dataclass(frozen=True)
class Record:
    """An image of a source, before it is opened.

    id: of the row that it becomes, unique in the source. name: what a fault calls it: file and line, or the like.
    data: whatever `Source.row` needs, as JSON can hold it. aliases: ids that the same picture has in other sources;
    a picture is excluded by any of them.
    """

    id: str
    name: str
    data: Any
    aliases: tuple[str, ...] = ()


class Notes:
    """What happened to records on the way: parts left out by a rule, and faults."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.faults: list[tuple[str, str, str, str]] = []  # what has it, its name, kind, message
        self.unread = 0

    def drop(self, rule: str, number: int = 1) -> None:
        """Count what is left out on purpose; `rule` says why, and of what: "crowd region"."""
        if number:
            self.dropped[rule] += number

    def skip(self, rule: str) -> None:
        """Count what was read and, on purpose, becomes no record: "image without annotation"."""
        self.unread += 1
        self.drop(rule)

    def fault(self, record: Record, fault: DataFault) -> None:
        """Note a fault of a record, or of one of its regions. It counts against the fault budget."""
        self.faults.append((record.id, record.name, fault.kind, str(fault)))

    def unreadable(self, name: str, fault: DataFault) -> None:
        """Note a fault of what should have become a record and could not."""
        self.unread += 1
        self.faults.append((name, name, fault.kind, str(fault)))


class Source(ABC):
    """Where images and what is known of them come from: one class a format, a dataclass of paths and settings.

    Its fields are the command line's flags. Instances go to other processes by pickle; what can't (an open file, a
    model) is made on first use.
    """

    unit = "image"
    """What faults and progress count."""
    features = FEATURES
    """The columns of its rows: CHAT_FEATURES with conversations."""

    @abstractmethod
    def inputs(self) -> list[str]:
        """Files and folders that everything is read from. Raises ValueError where one is missing. A file that changes
        between two calls ends the build."""

    @abstractmethod
    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        """Every image once, in an order that is the same at every call, in bounded memory; `scratch` is an empty
        folder for what does not fit. What is no record is noted as a fault."""

    def row(self, record: Record, notes: Notes) -> dict[str, Any] | None:
        """A record as a row of the schema, checked; None where it is left out by a rule, which is noted. Raises
        DataFault; faults of single regions are noted instead."""
        raise NotImplementedError

    def rows(self, records: list[Record], notes: Notes) -> Iterator[dict[str, Any]]:
        """Rows of the records that are good, in order; faults are noted. For sources that work by batches."""
        for record in records:
            try:
                row = self.row(record, notes)
            except DataFault as fault:
                notes.fault(record, fault)
            except RecursionError:  # what was parsed just so may be too deep to be shown
                notes.fault(record, DataFault("nesting", "nested too deeply"))
            else:
                if row is not None:
                    yield row
