"""What the frozen encoder of a run knows of regions, beside itself before training and plain pixels.

    python bench/probe.py RUN          writes bench/results/probe.json and docs/figures/probe.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rows import results_folder

from granvit.data.loader import GranDataset
from granvit.data.sample import cached_sample
from granvit.eval.probe.picture import draw
from granvit.eval.probe.probing import probe
from granvit.train.metrics_log import write_aside
from granvit.train.presets import PRESETS

IMAGES = 1500  # of either split
PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "probe.png"


def main(run: str) -> None:
    data = PRESETS["smoke"].data
    path = str(cached_sample(data.images, pages=data.pages))
    train, test = (GranDataset(path, split) for split in ("train", "test"))
    result = probe([f"before=random:{run}", f"after={run}"], train, test, IMAGES)
    result["data"] = "the sample set"
    draw(result, test).savefig(PICTURE, dpi=100)
    del result["nearest"]
    write_aside(results_folder() / "probe.json", json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
