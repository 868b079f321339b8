"""What ends a piece of work that several processes may share. It needs no torch: commands name it before they begin."""


class Failed(RuntimeError):
    """The work can't go on. The message is for whoever started it: why, and what to do."""
