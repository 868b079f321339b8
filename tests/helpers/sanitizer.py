"""A sanitizer for Triton kernels in Triton's interpreter: it checks every word that every program touches.

    with Sanitizer() as sanitizer:
        output = launcher(...)
    sanitizer.written(output)

The first fault raises Fault, which names the kernel, the program and the argument. Faults are:

- an access outside the view that an argument is, even inside its storage, or between two of its elements
- a word that two programs of one launch write, or that one writes and another reads; several may update it atomically
- a store that writes one word twice
- a read, by a kernel or by torch, of what torch.empty and its like left unwritten
- an output with elements that nobody wrote (`written`)
- a hint that does not hold (tl.multiple_of, max_contiguous, max_constancy, assume): the compiler makes 16-byte accesses
  of what it promises. What Triton assumes of a launch's arguments always holds, since it looks at their values.

What a load without `other` gives where its mask is false, anything on a GPU, is NaN or -1 here.

How: each argument of a launch gets an address of its own, 2**40 bytes from the next. So an address tells which argument
is meant, however far it misses, and memory is touched only where the access is right. The interpreter runs programs one
after another, a GPU at once: whether they disturb each other is seen from who touched which word, not from results.

Limits: CPU tensors; a storage has words of one size; programs that wait for each other are taken for a race, and what
the threads of one program do to each other is not seen.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

SPACE = 1 << 40
"""Bytes of addresses that an argument has."""

DISTURBED_BY = {
    "reads": ("writes", "updates"),
    "writes": ("reads", "writes", "updates"),
    "updates": ("reads", "writes"),
}
"""What another program must not do to the same word. An update is an atomic operation."""

OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_")
"""Operations of torch that write a whole tensor in place and read none of it."""

NOBODY, SEVERAL = 0, 2**16 - 1
"""In the place of a program's number; programs count from 1."""


class Fault(AssertionError):
    """A kernel, or its launcher, does what it must not."""


class Memory:
    """One storage, word by word. `written`: which words hold something; None: all do."""

    def __init__(self, tensor: Tensor, written: bool) -> None:
        self.storage = tensor.untyped_storage()  # kept, so that nothing else comes to lie there
        self.itemsize = tensor.itemsize
        self.size = self.storage.nbytes() // self.itemsize
        self.written = None if written else np.zeros(self.size, bool)
        self.programs: dict[str, np.ndarray] = {}  # of this launch: which of them reads, writes, updates each word
        self.names: dict[str, None] = {}  # what kernels call it

    def words(self, tensor: Tensor) -> np.ndarray:
        """Where the elements of a view lie, in its shape."""
        self.check_itemsize(tensor.itemsize)
        words = np.array(tensor.storage_offset())
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            words = words[..., None] + np.arange(size) * stride
        return words

    def check_itemsize(self, itemsize: int) -> None:
        if itemsize != self.itemsize:
            raise NotImplementedError(f"elements of {itemsize} bytes in a storage of {self.itemsize}-byte words")


class Argument:
    """A tensor as a kernel sees it here. The interpreter asks for its address and dtype."""

    def __init__(self, name: str, tensor: Tensor, memory: Memory, number: int) -> None:
        self.name, self.dtype, self.memory = f"{name} {list(tensor.shape)}", tensor.dtype, memory
        self.first = tensor.storage_offset()
        self.address = number * SPACE + SPACE // 2 + tensor.data_ptr() % 4096  # as well aligned as it is
        self.shift = np.uint64((tensor.data_ptr() - self.address) % 2**64)
        self.inside = np.zeros(memory.size, bool)
        self.inside[memory.words(tensor)] = True

    def data_ptr(self) -> int:
        return self.address

    def access(self, kind: str, addresses: np.ndarray) -> None:
        """Notes what the interpreter's present program does here. Raises Fault where it must not."""
        memory = self.memory
        words, between = np.divmod(addresses.astype(np.int64) - self.address, memory.itemsize)
        words += self.first
        self._refuse(between != 0, words, "between two elements")
        self._refuse((words < 0) | (words >= memory.size), words, "outside its storage")
        self._refuse(~self.inside[words], words, "outside the view")
        if kind == "writes" and np.unique(words).size < words.size:
            raise Fault("twice at one word")
        if kind != "writes" and memory.written is not None:
            self._refuse(~memory.written[words], words, "where nobody wrote")
        if kind != "reads" and memory.written is not None:
            memory.written[words] = True

        builder = interpreter.interpreter_builder
        program = 1 + int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        if program >= SEVERAL:
            raise NotImplementedError(f"a launch of {SEVERAL} programs or more")
        for other in DISTURBED_BY[kind]:
            if other in memory.programs:
                who = memory.programs[other][words]
                bad = (who != NOBODY) & (who != program)
                if bad.any():
                    self._refuse(bad, words, f"which {_program(who[bad][0])} {other} too")
        if kind not in memory.programs:
            memory.programs[kind] = np.zeros(memory.size, np.uint16)  # pages that stay zero take no memory
        before = memory.programs[kind][words]
        memory.programs[kind][words] = np.where((before == NOBODY) | (before == program), program, SEVERAL)

    def _refuse(self, bad: np.ndarray, words: np.ndarray, where: str) -> None:
        if bad.any():
            raise Fault(f"{where}, at word {words[bad][0] - self.first}")


class Sanitizer(TorchDispatchMode):
    """Checks what kernels do while it is active, and torch's own reads of memory that nobody wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[int, Memory] = {}
        self.arguments: dict[int, Argument] = {}
        self.patches = ExitStack()

    # ---- the interpreter ----

    def __enter__(self) -> Sanitizer:
        for owner, name, hook in (
            (GridExecutor, "__call__", self._launch),
            (GridExecutor, "_init_args_hst", self._start),
            (GridExecutor, "_restore_args_dev", lambda *_: None),  # it copies memory onto itself
            (InterpreterBuilder, "create_masked_load", self._load),
            (InterpreterBuilder, "create_masked_store", self._store),
            (InterpreterBuilder, "create_atomic_rmw", self._atomic_rmw),
            (InterpreterBuilder, "create_atomic_cas", self._atomic_cas),
            (InterpreterBuilder, "create_assume", self._assume),
            (TensorHandle, "set_attr", self._hint),
        ):
            self.patches.enter_context(mock.patch.object(owner, name, _method(getattr(owner, name), hook)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patches.close()
        super().__exit__(*error)

    def _launch(self, call, executor, *args, **kwargs):
        try:
            call(executor, *args, **kwargs)
        except InterpreterError as error:  # one around another, for each function that was called
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Fault):
                cause = cause.__cause__
            if cause is None:
                raise
            program = interpreter.interpreter_builder.grid_idx
            raise Fault(f"{executor.fn.__name__}, program {program}: {cause}") from error

    def _start(self, _, executor, args, kwargs):
        self.arguments = {}
        for memory in self.memories.values():
            memory.programs = {}

        def seen(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                memory = self._memory(value)
                memory.names[f"{executor.fn.__name__}'s {name}"] = None
                number = len(self.arguments) + 1
                self.arguments[number] = Argument(name, value, memory, number)
                return self.arguments[number]
            if isinstance(value, tuple):
                return interpreter._tuple_create(value, (seen(f"{name}[{i}]", v) for i, v in enumerate(value)))
            if isinstance(value, TensorDescriptor):
                base = seen(name, value.base)
                return TensorDescriptor(base, value.shape, value.strides, value.block_shape, value.padding)
            return value

        # Positional arguments need not be all of them.
        by_position = [seen(name, value) for name, value in zip(executor.arg_names, args, strict=False)]
        return by_position, {name: seen(name, value) for name, value in kwargs.items()}

    def _load(self, load, builder, pointers, mask, other, *rest, **options):
        if other is None:
            dtype = interpreter._get_np_dtype(pointers.get_element_ty())
            anything = np.full((*pointers.data.shape, dtype.itemsize), 255, np.uint8).view(dtype)[..., 0]
            other = TensorHandle(anything, pointers.get_element_ty())
        return load(builder, self._access("reads", pointers, mask.data), mask, other, *rest, **options)

    def _store(self, store, builder, pointers, value, mask, *rest):
        return store(builder, self._access("writes", pointers, mask.data), value, mask, *rest)

    def _atomic_rmw(self, update, builder, operation, pointers, value, mask, *rest):
        return update(builder, operation, self._access("updates", pointers, mask.data), value, mask, *rest)

    def _atomic_cas(self, update, builder, pointers, *rest):
        return update(builder, self._access("updates", pointers, True), *rest)

    def _access(self, kind: str, pointers: TensorHandle, mask: Any) -> TensorHandle:
        """Checks what an operation touches, and gives the addresses that memory really has."""
        addresses, lanes = pointers.data, np.broadcast_to(mask, pointers.data.shape).astype(bool)
        numbers, real = addresses // np.uint64(SPACE), addresses.copy()
        for number in np.unique(numbers[lanes]).tolist():
            if number not in self.arguments:
                raise Fault(f"{kind} at an address that belongs to no argument")
            argument, here = self.arguments[number], lanes & (numbers == number)
            argument.memory.check_itemsize(_itemsize(pointers))
            try:
                argument.access(kind, addresses[here])
            except Fault as fault:
                raise Fault(f"{kind} {argument.name} {fault}") from None
            real[here] += argument.shift
        return TensorHandle(real, pointers.dtype)

    def _assume(self, _, builder, condition):
        if not condition:
            raise Fault("assumes what is false")

    def _hint(self, set_attr, handle, name, values):
        for axis, value in enumerate(values):
            numbers = np.moveaxis(handle.data, axis, -1).astype(np.int64)
            step = _itemsize(handle) if isinstance(handle.dtype, tl.pointer_type) else 1
            steps = np.diff(numbers)
            within = np.arange(1, steps.shape[-1] + 1) % value != 0  # steps inside groups of `value` numbers
            if name == "tt.divisibility":  # of the first of each run of consecutive numbers
                first = np.ones(numbers.shape, bool)
                first[..., 1:] = steps != step
                holds = (numbers[first] % value == 0).all()
            else:
                holds = (steps[..., within] == (step if name == "tt.contiguity" else 0)).all()
            if not holds:
                raise Fault(f"promises {name} {value} of axis {axis} of numbers that don't have it")
        set_attr(handle, name, values)

    # ---- torch ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema, kwargs = func._schema, kwargs or {}
        name = schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_")) or name.endswith("_like"):
            result = func(*args, **kwargs)
            if name.startswith(("empty", "new_empty")) and result.untyped_storage().nbytes():
                self.memories[result.untyped_storage().data_ptr()] = Memory(result, written=False)
            return result
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        changed = []
        for argument in schema.arguments:
            tensors = [t for t in tree_leaves(given.get(argument.name)) if isinstance(t, Tensor)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes:
                changed += tensors
            if not writes or not (argument.is_out or name in OVERWRITES):
                self.written(tensors, f"torch's {name} reads")
        result = func(*args, **kwargs)
        for tensor in changed:
            memory = self._memory(tensor)
            if memory.written is not None:
                memory.written[memory.words(tensor)] = True
        return result

    def written(self, tensors: Any, what: str = "an output with") -> None:
        """Raises Fault where one of these tensors has elements that nobody wrote. tensors: any nest of them."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            memory = self._memory(tensor)
            if memory.written is None:
                continue
            missing = ~memory.written[memory.words(tensor)]
            if missing.any():
                at = np.argwhere(missing)[0].tolist()
                raise Fault(
                    f"{what} {missing.sum()} of {missing.size} elements that nobody wrote, the first {at}, "
                    f"shape {list(tensor.shape)}: {', '.join(memory.names) or 'no kernel had it'}"
                )

    def _memory(self, tensor: Tensor) -> Memory:
        """The storage of any tensor. What was not seen empty holds something."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():  # these may share an address
            return Memory(tensor, written=True)
        return self.memories.setdefault(storage.data_ptr(), Memory(tensor, written=True))


def _program(number: int) -> str:
    if number == SEVERAL:
        return "more than one program"
    index = np.unravel_index(number - 1, interpreter.interpreter_builder.grid_dim)
    return f"program {tuple(map(int, index))}"


def _itemsize(pointers: TensorHandle) -> int:
    """Bytes of what pointers point to."""
    return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)


def _method(original: Any, hook: Any) -> Any:
    """A method that hands what it is called with, and itself as it was, to `hook`."""
    return lambda *args, **kwargs: hook(original, *args, **kwargs)


def sanitized(function: Any, *args: Any, **kwargs: Any) -> Any:
    """function's tensors, computed under the sanitizer: without a fault, each wholly written."""
    with Sanitizer() as sanitizer:
        outputs = function(*args, **kwargs)
    sanitizer.written(outputs)
    return outputs
