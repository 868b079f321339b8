"""The command `granvit audit`."""

from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from granvit.machine import default_device

console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def audit(
    data: Positional[Path],
    split: str = "train",
    output: Path = Path("audit"),
    model: Path | None = None,
    images: int | None = 10_000,
    checked_images: int = 500,
    device: str = "auto",
    workers: int | None = None,
) -> None:
    """Write a page about a dataset: its numbers, its faults, some regions, and captions that a model doubts.

    Args:
        data: A Gran dataset.
        split: The split that is looked at.
        output: A new or an empty folder for index.html and audit.json.
        model: A run's folder, or a folder of save_pretrained's, whose model checks the captions.
        images: Rows that are looked at, spread over the split; None: all.
        checked_images: Images of these that the model checks.
        device: Where the model runs; auto: a GPU where there is one.
        workers: Processes; None: one a core.
    """
    from granvit.audit.page import audit as write_audit

    if device == "auto":
        device = default_device()
    result = write_audit(data, output, split, model, images, checked_images, device, workers)
    numbers = result["numbers"]
    console.print(f"{numbers['rows']:,} rows, {numbers['faulty']:,} of them with faults")
    if model:
        console.print(f"{result['checked']:,} captions checked, {result['below']:,} fit other boxes better")
    console.print(f"wrote {output / 'index.html'}")
