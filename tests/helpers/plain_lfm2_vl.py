"""Run as a program: what plain transformers answers with a folder of `save_lfm2_vl`, where granvit can't be imported.

Arguments: the folder, which also holds given.safetensors and question.txt; a picture; a file for what comes out.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

folder, image, output = map(Path, sys.argv[1:])
sys.modules["granvit"] = sys.modules["granvit_kernels"] = None  # an import of one would fail

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

model = AutoModelForImageTextToText.from_pretrained(folder).eval()
given = load_file(folder / "given.safetensors")
if find_spec("torchvision"):  # Lfm2-VL's image processor wants it
    processor = AutoProcessor.from_pretrained(folder)
    question = (folder / "question.txt").read_text(encoding="utf-8")
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
with torch.no_grad():
    logits = model(**given).logits
    answer = model.generate(**given, max_new_tokens=12)
answer = answer[:, given["input_ids"].shape[1] :]
kept = {name: tensor.contiguous() for name, tensor in given.items()}
save_file({**kept, "logits": logits.contiguous(), "answer": answer.contiguous()}, output)
print(type(model).__name__)
