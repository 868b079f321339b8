"""How well a model's doubts find wrong captions that were planted on purpose: bench/results/audit.json.

    python bench/audit.py RUN [--images N] [--data DIR] [--output FILE]

RUN is a run's folder or a model's, by whose name the result calls it. The pictures are those of the sample set's test
split, which the smoke preset has not trained on, or N of them. Of each variant of wrong captions 10 % are planted; the
figures are areas under the ROC curve, 0.5 being chance, of the score and of its parts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.progress import track

from granvit.audit.cycle import IMAGES, PARTS, Checked, auc, check_regions
from granvit.audit.planting import VARIANTS, plant
from granvit.data.loader import GranDataset, spread
from granvit.data.sample import cached_sample
from granvit.eval.loading import load_model
from granvit.machine import commit, device_name

RESULTS = Path(__file__).parent / "results"
SHARE = 0.1


def areas(checked: list[Checked], wrong: set[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Areas of the score and its parts, and how many regions there are: over all and by kind."""
    kinds = {}
    for kind in ("all", "natural", "ocr"):
        mine = [one for one in checked if kind in ("all", one.region.kind)]
        parts = [[one for one in mine if ((one.row, one.place) in wrong) is planted] for planted in (True, False)]
        measures = {"score": lambda one: one.score} | {name: lambda one, name=name: one.parts[name] for name in PARTS}
        kinds[kind] = {"planted": len(parts[0]), "right": len(parts[1])} | {
            name: round(auc(*([measure(one) for one in part] for part in parts)), 4)
            for name, measure in measures.items()
        }
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("--images", type=int, help="N images only, spread evenly")
    parser.add_argument("--data", help="another Gran dataset with a test split")
    parser.add_argument("--output", type=Path, default=RESULTS / "audit.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, processor = load_model(options.model, options.device)
    dataset = GranDataset(options.data or cached_sample(10000), "test")
    rows = spread(len(dataset), options.images)
    samples = [sample for sample in map(dataset.__getitem__, rows) if sample is not None]
    result = {
        "commit": commit(),
        "device": device_name(options.device),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets)},
        "model": Path(options.model).resolve().name,
        "data": "sample set of 10000, test split" if options.data is None else Path(options.data).name,
        "images": len(samples),
        "share": SHARE,
        "variants": {},
    }
    for variant in VARIANTS:
        planted, wrong = plant(samples, variant, SHARE)
        start = time.perf_counter()
        groups = track(check_regions(model, processor, planted), variant, total=-(-len(samples) // IMAGES))
        checked = [one for group in groups for one in group]
        seconds = round(time.perf_counter() - start, 1)
        result["variants"][variant] = {"seconds": seconds, "auc": areas(checked, wrong)}
        print(variant, json.dumps(result["variants"][variant]["auc"]["all"]))
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
