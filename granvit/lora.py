"""Low-rank adapters (LoRA, through peft) on an LLM, so that stage 2 of one of 7-8 billion weights fits a GPU.

The LLM's own weights are frozen and need neither gradients nor Adam's two moments; only the adapters, about half a
percent as many, have them. Bytes a weight: 2 (bfloat16) for the LLM's own; 4 + 4 + 4 + 4 (weight, gradient, moments,
all float32) for an adapter's; trained whole, each of the LLM's takes those 16. In GB, of rank 16 on every linear layer
(`lora_memory`):

| LLM | weights | adapters | the LLM's | adapters' weights, gradients and moments | together | trained whole |
|---|---|---|---|---|---|---|
| Qwen2.5-1.5B | 1.54 G | 18 M | 3.1 | 0.3 | 3.4 | 24.7 |
| Qwen2.5-7B | 7.62 G | 40 M | 15.2 | 0.6 | 15.9 | 121.9 |
| Llama-3-8B | 8.03 G | 42 M | 16.1 | 0.7 | 16.7 | 128.5 |

Importing this is cheap: a run's configuration holds its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from granvit import flags

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

ALL_LINEAR = "all-linear"
ADAPTER = ".lora_"
"""In the names of adapters' parameters, and of no others."""


@dataclass(frozen=True)
class Lora:
    """Adapters on the LLM's linear layers: W x + alpha / rank * B A x; A [rank, in] begins random, B [out, rank] zero.

    Raises ValueError for numbers out of range.
    """

    rank: Annotated[int, flags.alias("--llm.lora")] = 0
    """Rank of the adapters; 0: none, the whole LLM learns. 16 is usual, with about ten times the learning rate that the
    whole LLM would have (2e-4)."""
    alpha: float | None = None
    """None is 2 * rank, a usual choice."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of the layers that get adapters (q_proj v_proj ...); all-linear: every one but the output table."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.targets or (self.alpha is not None and not self.alpha > 0):
            raise ValueError(
                f"lora: rank is {self.rank} (at least 0), alpha {self.alpha} (above 0), targets {self.targets} (some)"
            )


def add_adapters(llm: PreTrainedModel, lora: Lora) -> None:
    """Give an LLM's layers adapters, in place: float32 and trained, while its own weights are frozen as they are.

    The LLM stays what it is, with the same outputs until the adapters have learnt; generation, packing and its own
    forward work as before. Raises ValueError where peft is missing or the targets name no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora: the package peft is missing (pip install 'granvit[lora]')") from error
    names = sorted({name.rpartition(".")[2] for name in _layers(llm, lora)})
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    inject_adapter_in_model(config, llm)  # transformers' own way to it wants another peft with each release
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(ADAPTER in name)
        if ADAPTER in name:
            parameter.data = parameter.data.float()


def adapters(llm: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters; none where there are no adapters."""
    return [parameter for name, parameter in llm.named_parameters() if ADAPTER in name]


def merged(state: Mapping[str, Tensor], llm: PreTrainedModel) -> dict[str, Tensor]:
    """A state dict of a model with this LLM in it, as it was without adapters: each is added to its layer's weight, in
    float32, and the sum rounded to the weight's dtype. What is added up lies on the CPU, the rest where it was."""
    from peft.tuners.lora import LoraLayer

    [scaling] = {layer.scaling["default"] for layer in llm.modules() if isinstance(layer, LoraLayer)}
    weights = {}
    for key, value in state.items():
        if ADAPTER in key:
            continue
        layer, inner, rest = key.partition(".base_layer.")
        if rest == "weight":
            a, b = (state[f"{layer}.lora_{which}.default.weight"].cpu().float() for which in "AB")
            value = (value.cpu().float() + scaling * (b @ a)).to(value.dtype)
        weights[f"{layer}.{rest}" if inner else key] = value
    return weights


def save_adapters(llm: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapters alone, for peft: PeftModel.from_pretrained(the LLM, folder). state: the LLM's state dict where
    its weights are spread over processes."""
    from safetensors.torch import save_file

    weights = {key: value for key, value in (llm.state_dict() if state is None else state).items() if ADAPTER in key}
    llm.peft_config["default"].save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{key.replace('.default.', '.')}": value.cpu().contiguous() for key, value in weights.items()
    }
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def lora_parameters(config: PretrainedConfig, lora: Lora) -> int:
    """How many weights the adapters have on an LLM of this configuration: rank * (inputs + outputs) a layer. No weight
    is made. Raises ValueError where the targets name no linear layer."""
    return sum(
        lora.rank * (layer.in_features + layer.out_features) for layer in _layers(_hollow(config), lora).values()
    )


def lora_memory(config: PretrainedConfig, lora: Lora) -> dict[str, int]:
    """Bytes of an LLM of this configuration while its adapters train: "weights" (its own, bfloat16), "adapters", their
    "gradients" and "moments" (float32), and "whole": all of these were the LLM trained without adapters. What the
    forward pass keeps for the backward one comes on top."""
    own, trained = sum(p.numel() for p in _hollow(config).parameters()), lora_parameters(config, lora)
    return {
        "weights": 2 * own, "adapters": 4 * trained, "gradients": 4 * trained, "moments": 8 * trained, "whole": 16 * own
    }  # fmt: skip


def _layers(llm: PreTrainedModel, lora: Lora) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by name. The output table is none of them: it may be the input's too."""
    from torch.nn import Linear

    head = llm.get_output_embeddings()
    linear = {name: m for name, m in llm.named_modules() if isinstance(m, Linear) and m is not head}
    if lora.targets == (ALL_LINEAR,):
        layers = linear
    else:
        layers = {name: m for name, m in linear.items() if name.rpartition(".")[2] in lora.targets}
    unknown = set(lora.targets) - {name.rpartition(".")[2] for name in layers} - {ALL_LINEAR}
    if unknown or not layers:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "no linear layer"
        raise ValueError(f"lora.targets: got {', '.join(sorted(unknown or lora.targets))}; the LLM has {known}")
    return layers


def _hollow(config: PretrainedConfig) -> PreTrainedModel:
    """An LLM without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
