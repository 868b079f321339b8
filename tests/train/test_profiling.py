import gzip
import json

import torch
from torch.profiler import record_function

from granvit.train.profiling import profiled


def test_a_profile_names_parts_operators_and_shapes_of_one_step(tmp_path):
    weight = torch.randn(33, 44)
    with profiled(tmp_path / "profile", torch.device("cpu")), record_function("granvit.encoder"):
        torch.randn(22, 33) @ weight
    text = (tmp_path / "profile" / "profile.txt").read_text()
    part = next(line for line in text.splitlines() if line.startswith("granvit.encoder"))
    assert part.split()[1] == "1"
    assert "aten::mm" in text and "[[22, 33], [33, 44]]" in text
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "granvit.encoder" for event in events) == 1
