"""roi_gather on a CPU beside torchvision in a Python loop, as models that read regions off unpadded maps call it: one
vector a box with adaptive sampling (FG-CLIP 2), and 16x16 features a box (Grasp Any Region). Needs torchvision.

16 images of 224 to 1536 pixels a side in patches of 16, 768 channels, 6 boxes an image (sides log-uniform in 0.05-0.9).
"""

from functools import partial

import expected
import pytest
from comparison import near
from peers import roi_align_loop_peers
from workloads import randn, regions

from granvit_kernels import roi_gather

pytest.importorskip("torchvision")
IMAGES, CHANNELS = 16, 768


@pytest.mark.parametrize(("bins", "ratio"), [(1, 0), (16, 2)], ids=["a vector a box", "16 x 16 a box"])
def test_roi_gather_as_others_call_roi_align(compare, bins, ratio):
    made = regions("B", "cpu", IMAGES)
    tokens = randn(made.layout.num_tokens, CHANNELS)
    ours = partial(roi_gather, tokens, made.layout, made.boxes, made.image_index, (bins, bins), ratio)
    samples = f"{ratio} samples" if ratio else "adaptive"
    count = len(made.boxes)
    workload = f"{IMAGES} images of 224 to 1536 px, {CHANNELS} channels, {count} boxes, {bins}x{bins}, {samples}"
    check = near(expected.roi_gather(made, tokens, None, bins, ratio))
    compare("roi_gather", "forward", workload, ours, roi_align_loop_peers(made, tokens, bins, ratio), check=check)
