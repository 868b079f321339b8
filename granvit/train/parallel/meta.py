"""Training on the meta device, whose tensors have shapes and no numbers: they stand for a GPU's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import distributed as ddp
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

LOWER = {"linear", "conv2d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum",
         "scaled_dot_product_attention"}  # fmt: skip
UPPER = {"layer_norm", "rms_norm", "cross_entropy", "softmax", "log_softmax", "cosine_similarity", "pow", "rsqrt",
         "exp", "logsumexp", "cdist"}  # fmt: skip


class OnGPU(TorchFunctionMode):
    """Inside, functions of tensors on meta keep as much as on a GPU: attention without its scores and, with `precision`
    bfloat16, autocast's copies. For the forward pass and the backward one, in which checkpointed blocks are computed
    again."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision
        self.copies: dict[Tensor, Tensor] = {}
        self.before: list[tuple[bool, torch.dtype]] = []

    def __enter__(self) -> OnGPU:
        self.before.append((torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")))
        torch.set_autocast_enabled("cuda", self.precision != torch.float32)
        torch.set_autocast_dtype("cuda", self.precision)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        enabled, dtype = self.before.pop()
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        self.copies.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda") and name in LOWER | UPPER:
            wanted = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, wanted), (args, kwargs))
        if func is Tensor.backward:
            return self._backward(*args, gradient=kwargs.get("gradient"))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor, gradient: Tensor | None) -> None:
        """torch's own leaves the mode, in which blocks are to be computed again."""
        gradient = torch.ones_like(loss) if gradient is None else gradient
        run = torch.autograd.Variable._execution_engine.run_backward
        with self:
            run((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _cast(self, tensor: Tensor, wanted: torch.dtype) -> Tensor:
        if not tensor.is_meta or not tensor.is_floating_point() or tensor.dtype in (wanted, torch.float64):
            return tensor
        if wanted == torch.float32 or not (tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(wanted)
        if tensor not in self.copies:  # autocast keeps those of what learns to the end of the forward pass
            self.copies[tensor] = tensor.to(wanted)
        return self.copies[tensor]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention, which on meta would make all scores, as the fused kernels keep it."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _Stream:
    """A stream or an event, on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Stream:
        return self

    def _nothing(self, *_: Any) -> None:
        pass

    record = wait = wait_event = wait_stream = synchronize = _nothing


_DEVICE = SimpleNamespace(
    Stream=_Stream, Event=_Stream, current_stream=_Stream, current_device=lambda: 0, device_count=lambda: 1,
    stream=nullcontext,
)  # fmt: skip
"""What torch.cuda is for a GPU, as far as meshes and FSDP ask for it."""


_INIT = ddp.DistributedDataParallel.__init__


def _search_unused(self: ddp.DistributedDataParallel, *arguments: Any, **options: Any) -> None:
    """As DDP's own, which without a search orders its buckets anew after a step, by numbers that it reads from the
    device."""
    _INIT(self, *arguments, **options | {"find_unused_parameters": True})


@contextmanager
def as_device() -> Iterator[None]:
    """Inside, torch treats meta as a device that can be trained on: FSDP2 and DDP take its tensors, and so do fused
    optimisers."""
    with ExitStack() as stack:
        torch._register_device_module("meta", _DEVICE)
        stack.callback(sys.modules.pop, "torch.meta")
        stack.callback(delattr, torch, "meta")
        stack.callback(_clear_sharding_prop_cache)  # it holds groups of ranks, by names that are given again
        for owner, name, ours in (
            (FSDPParamGroup, "_validate_no_meta_params", lambda _: None),
            (torch.accelerator, "current_stream", _Stream),
            (ddp, "_verify_param_shape_across_processes", lambda *_, **__: None),
            (ddp.DistributedDataParallel, "__init__", _search_unused),
            (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"]),
        ):
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


@contextmanager
def fake_group(rank: int, ranks: int) -> Iterator[None]:
    """Inside, this process is rank `rank` of `ranks`, by torch's fake process group: collectives of tensors on meta end
    at once, and nothing comes of them. One rank has no group."""
    if ranks == 1:
        yield
        return
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch would name the rank before each line of a traceback from now on
