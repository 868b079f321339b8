import gzip
import json

import torch
from torch.profiler import record_function

from granvit.train.profiling import WARM_UP, profile_step


def test_a_profile_names_parts_operators_and_shapes_of_one_step(tmp_path):
    weight, calls = torch.randn(33, 44), []

    def step():
        calls.append(1)
        with record_function("granvit.encoder"):
            torch.randn(22, 33) @ weight

    text = profile_step(step, tmp_path / "profile", torch.device("cpu"))
    assert len(calls) == WARM_UP + 1
    assert (tmp_path / "profile" / "profile.txt").read_text() == text
    part = next(line for line in text.splitlines() if line.startswith("granvit.encoder"))
    assert part.split()[1] == "1"
    assert "aten::mm" in text and "[[22, 33], [33, 44]]" in text
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "granvit.encoder" for event in events) == 1
