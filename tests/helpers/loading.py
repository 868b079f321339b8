"""What tests of loading share: a small loader, what its batches show, and Parquet files to read."""

from pathlib import Path

from granvit.data.batches import PackLoader
from granvit.data.shards import RowWriter

TASKS = {"bbox2caption": 1.0, "caption2bbox": 1.0, "global_caption": 2.0}


def loader(data, processor, **options) -> PackLoader:
    options = {"capacity": 400, "packs": 4, "questions": 3, "workers": 0, "window": 24, "epochs": 1} | options
    return PackLoader(data, processor, TASKS, **options)


def seen(batch, processor) -> list[list[tuple[str, list[str]]]]:
    """Each sequence as its images' ids with the questions' texts, in the order in which they stand."""
    packed, rows = batch.packed, []
    for r in range(packed.input_ids.shape[0]):
        row = []
        for i in dict.fromkeys(packed.image_index[r][packed.image_index[r] >= 0].tolist()):
            own = packed.image_index[r] == i
            numbers = range(1, int(packed.question_index[r][own].max()) + 1)
            texts = [packed.input_ids[r][own & (packed.question_index[r] == n)].tolist() for n in numbers]
            row.append((batch.samples[i].id, [processor.tokenizer.decode(ids) for ids in texts]))
        rows.append(row)
    return rows


def joined(parts: list[list]) -> list:
    """Sequences of all ranks in the batch's order."""
    return [one for several in zip(*parts, strict=True) for one in several]


def write_parquet(folder: Path, rows: list[dict], files: int = 3) -> None:
    folder.mkdir(parents=True)
    for index in range(files):
        with RowWriter(folder / f"train-{index:05d}-of-{files:05d}.parquet") as writer:
            for row in rows[index::files]:
                writer.write(row)
