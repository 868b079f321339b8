"""A GranViT in the harnesses that measure vision-language models: lmms-eval (lmms.py) and VLMEvalKit (vlmeval.py).

Either file imports its harness, which granvit does without; the rest of the folder is what they share.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval's entry point "lmms_eval.models" wants: where the model named granvit is. It asks at every start,
    whichever model runs, so nothing heavy is imported here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="granvit", simple_class_path="granvit.harness.lmms.GranViTForLmmsEval")
