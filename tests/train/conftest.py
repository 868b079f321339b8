import dataclasses

import pytest

from granvit.data.sample import build_sample
from granvit.train.presets import PRESETS, Data, Model


@pytest.fixture(scope="session")
def sample_set(tmp_path_factory):
    """A sample set of few images: photographs, scenes and pages."""
    path = tmp_path_factory.mktemp("data") / "sample"
    build_sample(path, images=80, seed=0, workers=1)
    return path


@pytest.fixture(scope="session")
def small_config(sample_set):
    """The smoke preset at a size that runs in seconds; tests choose the output folder."""
    smoke = PRESETS["smoke"]
    few = {"packs": 2, "warmup_steps": 2}
    return dataclasses.replace(
        smoke,
        output="",
        data=Data(path=str(sample_set), eval_images=6, workers=0, fault_budget=0.0),
        model=Model(
            encoder_width=32, encoder_layers=1, encoder_heads=2, llm_width=32, llm_layers=1, llm_heads=2,
            vocabulary=400, max_image_tokens=9, bins=8,
        ),
        warmup=dataclasses.replace(smoke.warmup, steps=3, **few),
        pretrain=dataclasses.replace(smoke.pretrain, steps=6, **few),
        adapt=dataclasses.replace(smoke.adapt, steps=4, **few),
        checkpoint_every=2,
        log_every=1,
        threads=1,  # on a busy machine two wait for each other most of the time
        control=False,
        device="cpu",
    )  # fmt: skip
