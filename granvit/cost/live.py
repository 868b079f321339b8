"""How many bytes tensors take while something runs, on the meta device too."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""CUDA's allocator gives multiples of so many bytes."""


class Live(TorchDispatchMode):
    """Counts the storages that are alive, as torch.cuda.max_memory_allocated does: those that `count` was told of, and
    those that operators make inside. (torch.distributed's MemTracker takes no model with frozen parameters.)

    device: a type of device, whose tensors count. now: bytes by name, "" for what has none. peak: what `now` was when
    its sum was largest, and when: what `phase` was then.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.phase, self.when = device, "", ""
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int]] = {}  # name and size, by the storage's id

    def __enter__(self) -> Live:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:  # so FSDP frees what it gathered
            resize(storage, size)
            self._resize(storage)
            return storage

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operators on pieces
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):  # with which DTensor works out shapes
                self.count(leaf)
        return out

    def count(self, tensor: Tensor, name: str = "") -> None:
        """Let a tensor's storage count from now on, of a DTensor that of its piece; under a name if one is given."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        key = id(storage)
        if tensor.device.type != self.device or (key in self._known and not name):
            return
        if key in self._known:
            self._forget(key)
        else:
            weakref.finalize(storage, self._forget, key).atexit = False
        self._add(key, name, storage.nbytes())

    def _resize(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            name, _ = self._known[key]
            self._forget(key)
            self._add(key, name, storage.nbytes())

    def _add(self, key: int, name: str, size: int) -> None:
        size = -(-size // BLOCK) * BLOCK
        self._known[key] = name, size
        self.now[name] += size
        if self.now.total() > self.peak.total():
            self.peak, self.when = self.now.copy(), self.phase

    def _forget(self, key: int) -> None:
        name, size = self._known.pop(key)
        self.now[name] -= size
