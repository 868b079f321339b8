"""What a row of a Gran dataset holds once it is checked, and what a fault in one is.

How rows are read and checked: granvit.data.schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = ("natural", "ocr")


class DataFault(ValueError):
    """Something in a row that can't be used. `kind` is a short name that faults are counted under. Of a message, which
    may quote what is wrong, 500 characters are kept."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message if len(message) <= 500 else f"{message[:500]} …")
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # by default it would be made of its message alone
        return type(self), (self.kind, str(self))


@dataclass(frozen=True)
class Region:
    """A box, relative xyxy after EXIF orientation, with the sentence or text that belongs to it."""

    box: tuple[float, float, float, float]
    caption: str
    kind: str
    score: float | None = None

    def fields(self) -> dict[str, Any]:
        """The region as an entry of a row's `regions`."""
        return {"box": list(self.box), "caption": self.caption, "kind": self.kind, "score": self.score}


Conversation = tuple[tuple[str, str], ...]
"""What the user says and what the assistant answers, turn by turn."""


@dataclass(frozen=True)
class Sample:
    """A checked row.

    image: uint8 [H, W, 3], oriented as EXIF says; [0, 0, 3] where there is none. dataset: its name, where several are
    mixed.
    """

    id: str
    image: torch.Tensor
    caption: str | None
    regions: tuple[Region, ...]
    source: str
    licence: str
    conversations: tuple[Conversation, ...] = ()
    dataset: str = ""
