"""`python -m granvit_kernels.hub --output DIR`: writes the package as a folder that Hugging Face's `kernels` loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m granvit_kernels.hub", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new, empty, or written by this command"
    )
    output = parser.parse_args().output
    try:
        write(output)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a loop
        raise SystemExit(f"nothing was written: {error}") from None
    print(f"written: kernels.get_local_kernel(Path({str(output)!r})) loads it")


if __name__ == "__main__":
    main()
