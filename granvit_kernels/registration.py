"""How an operator meets torch: torch.library for compile and export, a cheap autograd.Function otherwise.

The registered operator costs 15 us a call and 101 us with its backward, the eager path 5 and 43: so
`Operator.__call__` takes the registered one only where torch has to see the call: under torch.compile, torch.jit.trace,
a dispatch mode or a torch.func transform, and for tensors without memory of their own. Both share one backward formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool})
"""Arguments that launchers can take as they are. A subclass (FakeTensor, DTensor) or a symbolic number is not."""

# Names of their own: looking them up would cost as much as calling them.
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_traced = torch._C._is_tracing

NAMESPACE = "granvit" if __package__ == "granvit_kernels" else __package__.replace(".", "_")
"""Of the operators in torch.ops: a copy of this package under another name must not define the same ones again."""

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def register(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Registers NAMESPACE::name and returns it as torch.ops has it.

    schema: as torch.library's, "name(Tensor x, int n) -> Tensor". launch: runs it on real tensors of any
    device. fake: gives empty outputs of the right shape, dtype and device.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=TAGS)
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of one device in autocast's dtype where it is enabled there; float64 stays."""
    device = "cuda" if tensors[0].is_meta else tensors[0].device.type  # meta stands for a GPU
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


@dataclass(frozen=True)
class Operator:
    """A differentiable operator: call it with the schema's arguments, positionally."""

    launch: Callable
    registered: Callable
    eager: type[torch.autograd.Function]
    differentiable: Sequence[int]

    @classmethod
    def define(
        cls,
        schema: str,
        launch: Callable,
        fake: Callable,
        *,
        backward_schema: str,
        backward_launch: Callable,
        backward_fake: Callable,
        setup_context: Callable[[Any, tuple, Any], None],
        backward: Callable[..., tuple],
        differentiable: Sequence[int] = (0,),
    ) -> Operator:
        """Registers forward and backward.

        setup_context(ctx, inputs, output): saves what backward needs.
        backward(run, ctx, *grads) -> a gradient or None for each input; `run` calls the backward operator.
        differentiable: positions of the inputs that may need a gradient.
        """
        registered = register(schema, launch, fake)
        registered_backward = register(backward_schema, backward_launch, backward_fake)
        name = schema.split("(", 1)[0]
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            functools.partial(backward, registered_backward),
            setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output),
            lib=LIBRARY,
        )

        def run_backward(*args: Any) -> Any:
            # torch.func.vjp calls it after the transform, with tensors that are still wrapped.
            wrapped = any(_wrapped(x) for x in args if isinstance(x, Tensor))
            return (registered_backward if wrapped or not _plain(args) else backward_launch)(*args)

        members = {
            "forward": staticmethod(launch),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(once_differentiable(functools.partial(backward, run_backward))),
        }
        eager = type(name, (torch.autograd.Function,), members)
        return cls(launch, registered, eager, tuple(differentiable))

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _traced():
            return self.registered(*args)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        plain = _plain(args)
        # torch.func differentiates an autograd.Function that has setup_context, but no registered operator.
        if (plain or _transform() is not None) and (
            torch.is_grad_enabled() and any(args[i].requires_grad for i in self.differentiable)
        ):
            return self.eager.apply(*args)
        return self.launch(*args) if plain else self.registered(*args)

    def _refuse_tangents(self, args: tuple) -> None:
        """Forward-mode AD would drop them silently: launchers read memory behind autograd's back."""
        if any(forward_ad.unpack_dual(args[i]).tangent is not None for i in self.differentiable):
            name = self.eager.__name__
            raise NotImplementedError(f"{name} has no forward-mode derivative; it takes tensors without a tangent")


def _plain(args: tuple) -> bool:
    """Nothing but memory and numbers, and nobody who would want to see the call. Costs about half a microsecond."""
    return (
        _PLAIN.issuperset(map(type, args)) and not args[0].is_meta and not _modes() and _transform() is None
    )
