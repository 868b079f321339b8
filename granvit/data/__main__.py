"""granvit data: makes and converts Gran datasets."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from granvit.data.annotate.source import Annotate
from granvit.data.build import Summary, build_dataset
from granvit.data.filters import Filter
from granvit.data.parallel import over_processes
from granvit.data.sources.coco import Coco
from granvit.data.sources.jsonl import Jsonl
from granvit.data.sources.labelme import Labelme
from granvit.data.sources.llava import Llava
from granvit.data.sources.pdf import Pdf
from granvit.data.sources.refcoco import RefCoco
from granvit.data.sources.visual_genome import VisualGenome
from granvit.data.sources.voc import Voc
from granvit.status import read, run

console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def sample(images: int, output: Path, seed: int = 0, workers: int | None = None, pages: float = 0.2) -> None:
    """Write the sample set: photographs, scenes, pages of text.

    Args:
        images: Pictures in both splits together, >= 16.
        output: A new or an empty folder.
        seed: Another seed makes other pictures.
        workers: Processes; None: one a core.
        pages: Share of pages of text.
    """
    from granvit.data.sample import build_sample

    build_sample(output, images, seed, workers, pages=pages)
    console.print(f"wrote {images} pictures to {output}")


FORMATS = {
    "jsonl": Jsonl,
    "coco": Coco,
    "refcoco": RefCoco,
    "visual-genome": VisualGenome,
    "labelme": Labelme,
    "voc": Voc,
    "pdf": Pdf,
    "llava": Llava,
}


def convert(
    source: Annotated[Union[tuple(Annotated[kind, subcommand(name)] for name, kind in FORMATS.items())], arg(name="")],  # noqa: UP007
    output: Path,
    split: str = "train",
    exclude: Path | None = None,
    fault_budget: float = 0.01,
    workers: int | None = None,
) -> None:
    """Convert another format to a Gran dataset. The same command again goes on where it was stopped.

    Args:
        source: The format and its files.
        output: A new or an empty folder, one with other splits, or one in which this very command was stopped.
        split: Name of the split that is written.
        exclude: File with one id a line; rows of these ids, and pictures known elsewhere by them, are left out.
        fault_budget: Share of images that may have faults before nothing is published.
        workers: Processes; None: one a core.
    """
    summary = build_dataset(source, output, split, workers, fault_budget=fault_budget, exclude=_ids(exclude))
    _built(output, summary)


def annotate(
    source: Annotate,
    output: Path,
    split: str = "train",
    fault_budget: float = 0.01,
    workers: int | None = None,
    shard_rows: int = 64,
    ray: str | None = None,
    gpus_per_worker: float = 0,
) -> None:
    """Find the regions of bare pictures with models. The same command again goes on where it was stopped.

    Args:
        source: The pictures and the models.
        output: A new or an empty folder, one with other splits, or one in which this very command was stopped.
        split: Name of the split that is written.
        fault_budget: Share of images that may have faults before nothing is published.
        workers: Processes, each with its own models; None: one a core, on a cluster as many as it has room for.
        shard_rows: Pictures a shard: as many as are done again after a stop, for each worker.
        ray: Have workers on a Ray cluster do it, HOST:PORT; auto: the one of RAY_ADDRESS or of this machine.
        gpus_per_worker: GPUs that the cluster gives each worker; 0.5: two share one.
    """
    with _over(ray, gpus_per_worker) as over:
        summary = build_dataset(source, output, split, workers, shard_rows, fault_budget, title="Annotating", over=over)
    _built(output, summary)


def filter(  # noqa: A001
    source: Annotated[Filter, arg(name="")],
    output: Path,
    exclude: Path | None = None,
    fault_budget: float = 0.01,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Write a Gran dataset without what its rules reject. The same command again goes on where it was stopped.

    Args:
        source: The dataset and the rules.
        output: A new or an empty folder, one with other splits, or one in which this very command was stopped.
        exclude: File with one id a line; rows of these ids are left out.
        fault_budget: Share of images that may have faults before nothing is published.
        workers: Processes; None: one a core, on a cluster as many as it has room for.
        ray: Have workers on a Ray cluster do it, HOST:PORT; auto: the one of RAY_ADDRESS or of this machine.
    """
    excluded = _ids(exclude)
    with _over(ray) as over:
        summary = build_dataset(
            source, output, source.split, workers, fault_budget=fault_budget, exclude=excluded, title="Filtering",
            over=over,
        )  # fmt: skip
    _built(output, summary)


def overlap(
    first: Positional[Path],
    second: Positional[Path],
    split: str = "train",
    other_split: str = "test",
    distance: int = 28,
    output: Path | None = None,
    page: Path | None = None,
    workers: int | None = None,
) -> None:
    """Find pictures that two datasets share, by id and by looks.

    Args:
        first: A Gran dataset, to be trained on.
        second: Another one, to be tested on.
        split: Split of the first.
        other_split: Split of the second.
        distance: Bits of 256 that two pictures' hashes may differ by.
        output: File for the ids of the first that the second has, for --exclude of convert and filter.
        page: HTML file that shows pairs side by side.
        workers: Processes; None: one a core.
    """
    from granvit.data.files import output_fault
    from granvit.data.overlap import find_overlap, write_ids, write_page

    for file in [file for file in (output, page) if file]:
        if fault := output_fault(file):
            raise ValueError(f"{file}: {fault}")
    shared = find_overlap(first, second, split, other_split, distance, workers)
    table = Table(show_header=False, box=None)
    for name, number in shared.lines():
        table.add_row(name, f"{number:,}")
    console.print(table)
    for match in shared.matches[:10]:
        console.print(f"{match.ids[0]!r:.60} is {match.ids[1]!r:.60} ({match.how})")
    if len(shared.matches) > 10:
        console.print(f"and {len(shared.matches) - 10:,} more")
    if output:
        if lost := write_ids(shared, output):
            console.print(f"{lost} ids have line breaks or outer spaces and could not be written", style="yellow")
        console.print(f"wrote {output}")
    if page:
        write_page(shared, first, second, split, other_split, page)
        console.print(f"wrote {page}")


def push(folder: Positional[Path], repository: Positional[str], private: bool = False) -> None:
    """Upload a Gran dataset to the Hugging Face hub, with its card. The same command again sends what is missing.

    Args:
        folder: What convert, annotate or filter wrote.
        repository: OWNER/NAME.
        private: Make the repository private, if it is a new one.
    """
    from granvit.data.build import check_built
    from granvit.hub import push

    check_built(folder)
    console.print(f"{folder} is in {push(folder, repository, 'dataset', private, ('README.md', '*.parquet'))}")


@contextmanager
def _over(ray: str | None, gpus: float = 0) -> Iterator[Any]:
    """What makes shards: processes of this machine, or workers of a cluster."""
    if ray is None:
        if gpus:
            raise ValueError("--gpus-per-worker needs --ray: on one machine workers share its GPU")
        yield over_processes
    else:
        from granvit.data.cluster import ray_cluster

        with ray_cluster(ray, gpus) as over:
            yield over


def _built(output: Path, summary: Summary) -> None:
    console.print(f"wrote {output}")
    console.print(summary.table())


def _ids(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from None
    if "\0" in text:  # of UTF-16, where every id would be unknown and none be left out
        raise ValueError(f"{file} is no text in UTF-8: it has NUL characters")
    return [line.removeprefix("\ufeff").strip() for line in text.splitlines()]  # files that were joined have several


COMMANDS = {
    "sample": sample, "convert": convert, "annotate": annotate, "filter": filter, "overlap": overlap, "push": push,
    "audit": resolve_name("granvit.audit.command:audit"),  # by its name: it stands on the model, above this package
}  # fmt: skip


SHORT = ("annotate", "audit")
"""Commands that are the console script's own, too."""


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """What a command line asks for, still to be done. Exits with a usage text for what it cannot read."""
    config = (OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
    later = {name: _later(work) for name, work in COMMANDS.items()}
    if arguments and arguments[0] in COMMANDS:  # by itself: errors then point to its own --help
        word, *rest = arguments
        return tyro.cli(later[word], prog=_named(arguments), args=rest, config=config)
    return tyro.extras.subcommand_cli_from_dict(
        later, prog="granvit data", description="Make, convert and examine Gran datasets.", args=arguments,
        config=config,
    )  # fmt: skip


def _named(arguments: Sequence[str]) -> str:
    """What the command of these words is called."""
    word = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    return f"granvit {word}" if word in SHORT else f"granvit data {word}".rstrip()


def _later(work: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function of the same arguments that returns the work, with them: tyro calls what it reads arguments for."""

    @functools.wraps(work)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(work, *args, **kwargs)

    return bound


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status (granvit.status)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = _named(arguments)
    return run(name, lambda: read(name, lambda: parse(arguments))())


if __name__ == "__main__":
    sys.exit(main())
