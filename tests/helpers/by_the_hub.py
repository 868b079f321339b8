"""python by_the_hub.py MODEL ROWS: a model and a dataset to the hub and back, as people do both, in a process whose
huggingface_hub knows one hub alone. Prints what came back."""

import json
import sys

import datasets
import numpy as np
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import granvit
from granvit.data.__main__ import main as data
from granvit.export import main as export

model, rows = sys.argv[1:]
codes = [
    export([model, "--push-to-hub", "me/whole", "--private", "--license", "mit"]),
    export([model, "--push-to-hub", "me/encoder", "--format", "encoder"]),
    data(["push", rows, "me/rows", "--private"]),
]
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
local, pushed = granvit.GranViT.from_pretrained(model), granvit.GranViT.from_pretrained("me/whole")
local.push_to_hub("me/again")
boxes = [(0.1, 0.2, 0.6, 0.9)]
places = {"me/encoder": {}, "me/whole": {"subfolder": "encoder"}}
features = [
    AutoModel.from_pretrained(name, **where)(
        **AutoImageProcessor.from_pretrained(name, **where)(images=picture, return_tensors="pt")
    ).last_hidden_state
    for name, where in places.items()
]
print(json.dumps({
    "codes": codes,
    "captions": [one.caption(picture, boxes) for one in (local, pushed)],
    "same features": bool((features[0] == features[1]).all()),
    "same weights": sorted(local.state_dict()) == sorted(granvit.GranViT.from_pretrained("me/again").state_dict()),
    "card": ModelCard.load("me/whole").text,
    "rows": len(datasets.load_dataset("me/rows", split="train")),
}))  # fmt: skip
