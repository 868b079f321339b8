"""Triton's interpreter, mended for bfloat16, which it stores as uint16.

As it comes (triton 3.6), tl.dot multiplies those integers, and a cast from float32 drops the lower bits where a GPU
rounds to nearest. Mended, both do as a GPU does. Other arithmetic on the integers is refused: kernels cast to float32
before it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def mend() -> None:
    """Mend it for this process, for kernels defined before and after."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        """bfloat16 as float32, exactly; anything else as it is."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16:
            return cast(self, widened(src), dst_type)
        data = torch.from_numpy(np.array(cast(self, widened(src), tl.float32).data))
        return TensorHandle(data.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)  # halves go to even

    def refusing(method: Any) -> Any:
        @functools.wraps(method)
        def checked(self: Any, first: Any, *rest: Any) -> Any:
            values = first if isinstance(first, tuple) else (first,)
            if any(getattr(value, "handle", value).dtype.scalar == tl.bfloat16 for value in values):
                raise TypeError("bfloat16 is uint16 to the interpreter: cast to float32 before arithmetic")
            return method(self, first, *rest)

        return checked

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    for owner, name in [
        (InterpreterBuilder, "binary_op"), (InterpreterBuilder, "unary_op"), (InterpreterBuilder, "create_fma"),
        (ReduceOps, "apply_impl"), (ScanOps, "apply_impl"),
    ]:  # fmt: skip
        setattr(owner, name, refusing(getattr(owner, name)))
