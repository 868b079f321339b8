"""The tiny LLM that the preset quick starts with."""

import json
import re

import pytest
import torch

from granvit.data.collate import collate
from granvit.data.loader import GranDataset
from granvit.model import GranViT
from granvit.model.llm import TOY, TOY_FOLDER, load_llm
from granvit.questions.prompts import BBOX2CAPTION
from granvit.toy.tiny import TinyVision, tiny_encoder
from granvit.train.presets import PRESETS
from granvit.train.step import warmup_loss


@pytest.fixture(scope="module")
def made():
    return json.loads((TOY_FOLDER / "made.json").read_text())


def test_it_is_what_its_record_says(made):
    llm, tokenizer = load_llm(TOY)
    model = made["model"]
    assert (llm.config.hidden_size, llm.config.num_hidden_layers) == (model["llm_width"], model["llm_layers"])
    assert len(tokenizer) <= model["vocabulary"] and tokenizer.eos_token == "<eos>"
    assert re.fullmatch("[0-9a-f]{7,40}", made["commit"]), "made of files that are in no commit"
    assert sum(path.stat().st_size for path in TOY_FOLDER.iterdir()) < 4e6
    assert PRESETS["quick"].model.llm == TOY


def test_it_knows_how_to_speak_of_what_it_is_told(made, sample_set):
    """In the form of the warm-up, of scenes that it was not warmed up on."""
    torch.manual_seed(0)
    vision = TinyVision(width=32, layers=1, heads=2, mlp=64, patch_size=8)
    shape = {name: made["model"][name] for name in ("max_image_tokens", "pixel_shuffle", "box_style", "bins")}
    shape["box_format"] = made["model"]["box_format"]
    losses = []
    for known in (True, False):
        model, processor = GranViT.from_parts(tiny_encoder(vision), TOY, **shape)
        for parameter in () if known else model.llm.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        test = GranDataset(sample_set, "test")
        samples = [sample for sample in (test[i] for i in range(len(test))) if sample.source == "scenes"][:4]
        asked = [processor.questions(sample, (BBOX2CAPTION,)) for sample in samples]
        batch = collate(samples, asked, processor, 256)
        with torch.no_grad():
            losses.append(warmup_loss(model, processor, batch, "0")["loss"].item())
    assert losses[0] < 1 and losses[1] > 3, losses
