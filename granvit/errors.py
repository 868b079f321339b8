"""What ends a piece of work that several processes may share, and how what is wrong is printed. It needs no torch:
commands name it before they begin."""


class Failed(RuntimeError):
    """The work can't go on. The message is for whoever started it: why, and what to do."""


def printable(text: str) -> str:
    """On one line, and nothing that a terminal obeys: names are other people's."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
