"""What ends a piece of work that several processes may share, and how messages write what is in them. It needs no
torch: commands name it before they begin."""


class Failed(RuntimeError):
    """The work can't go on. The message is for whoever started it: why, and what to do."""


def printable(text: str) -> str:
    """On one line, and nothing that a terminal obeys: names are other people's."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def byte_size(size: float) -> str:
    """A number of bytes in a few characters."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
