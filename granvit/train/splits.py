"""The datasets of a run: what it learns, and what it is asked about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from granvit.data.loader import GranDataset, open_dataset
from granvit.data.mixture import open_split
from granvit.data.sample import cached_sample
from granvit.train.presets import TrainConfig


def with_data(config: TrainConfig) -> TrainConfig:
    """The configuration with the sample set's folder where it names no data."""
    if config.data.path is not None:
        return config
    folder = cached_sample(config.data.images, seed=0, pages=config.data.pages)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder)))


def open_splits(config: TrainConfig) -> dict[str, GranDataset]:
    """What a run reads: "train" and "test", whose regions it learns and is asked about, and where it has the stage sft
    "chat" and "chat_test", conversations to learn and to be scored on.

    A run of sft alone may lack the first two, and any "chat_test". Raises ValueError where another one is missing, or
    there is nothing to ask.
    """
    data, splits = config.data, {}
    if any(stage is not config.sft for stage in config.stages) or config.warmup.runs:
        for split in ("train", "test"):
            splits[split] = open_split(data.paths, split, data.fault_budget)
            _need_regions(splits[split])
    elif _have(data.paths, "train") and _have(data.paths, "test"):
        both = {split: open_split(data.paths, split, data.fault_budget) for split in ("test", "train")}
        splits |= both if all(map(_regions, both.values())) else {}
    if config.sft.runs:
        chats = (data.chat,) if data.chat else data.paths
        splits["chat"] = open_split(chats, "train", data.fault_budget)
        if _have(chats, "test"):
            splits["chat_test"] = open_split(chats, "test", data.fault_budget)
    return splits


def _have(paths: Sequence[str], split: str) -> bool:
    """Whether all of these datasets have the split."""
    opened = map(open_dataset, paths)
    return all(split in dataset if isinstance(dataset, dict) else split == "train" for dataset in opened)


def _regions(data: GranDataset) -> bool:
    return any(sample is not None and sample.regions for sample in map(data.annotations, range(len(data))))


def _need_regions(data: GranDataset) -> None:
    for part in data.parts:
        if not _regions(part):
            raise ValueError(f"{part.path}: its split {part.split} has no region, so nothing can be asked about one")
