"""The in-place class swap: a module keeps its identity, names and parameters, and runs adapters.

`hosted(cls)` is one subclass per base class (cached, same name), so `isinstance`, `.weight`, key
names, compile guards and wrapping policies that look at classes see what they saw before.
Everything of ours lies in `module.adapters`, a `Stack`; taking it off and putting the class back
leaves the module as it was.
"""

from __future__ import annotations

import functools

from torch import nn

from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import UnsupportedError, UsageError

from .describing import runs_plainly
from .running import run
from .single import run_single
from .stack import Stack

STACK = "adapters"
WRAPPED = "_original_forward_func"  # where compressed-tensors' offloading keeps a forward


class Host:
    """What a hosted module's class has beside its base class."""

    hosted_class: type[nn.Module]

    def forward(self, *args: object, **kwargs: object) -> object:
        stack: Stack = self._modules[STACK]  # type: ignore[attr-defined]
        if not stack.plan:
            return self.hosted_class.forward(self, *args, **kwargs)  # type: ignore[arg-type]
        entry = stack.single
        if entry is not None and len(args) == 1 and not kwargs:
            return run_single(self, stack, entry, args[0])  # type: ignore[arg-type]
        return run(self, stack, args, kwargs)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _rebuild, (self.hosted_class,), self.__dict__


@functools.cache
def hosted(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that runs adapters.

    `base` comes first, or the layout of objects would be another one for classes like quanto's
    QLinear, and the swap refused.
    """
    names = {
        "forward": Host.forward,
        "__reduce_ex__": Host.__reduce_ex__,
        "hosted_class": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base, Host), names)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = hosted(base)
    return cls.__new__(cls)


def is_hosted(module: nn.Module) -> bool:
    """Whether adapters are attached to this module."""
    return isinstance(module, Host)


def stack_of(module: nn.Module) -> Stack:
    """The adapters of a hosted module."""
    stack = module._modules[STACK]
    assert isinstance(stack, Stack)
    return stack


def host(module: nn.Module, layer: Layer, path: str) -> Stack:
    """Swap the class in if that has not happened, and return the module's stack.

    UsageError when the module has something named `adapters`, or runs a forward that was put on
    the instance (it would bypass the adapters; that of compressed-tensors rounds the input and
    calls the class's).
    """
    if is_hosted(module):
        return stack_of(module)
    if hasattr(module, STACK):
        raise UsageError(f"{path}: the module has an attribute {STACK!r} of its own.")
    if "forward" in module.__dict__ and not _calls_its_class(module):
        raise UnsupportedError(
            f"{path}: its forward was replaced on the instance (accelerate's dispatch and LyCORIS "
            "do that), which bypasses adapters. Attach first, or remove that hook."
        )
    stack = Stack(layer)
    stack.training = module.training
    stack.whole = runs_plainly(module)
    module._modules[STACK] = stack
    module.__class__ = hosted(type(module))
    return stack


def _calls_its_class(module: nn.Module) -> bool:
    """Whether the forward on the instance is the one of compressed-tensors, perhaps below the one
    of its offloading.
    """
    function = getattr(module, WRAPPED, getattr(module.__dict__["forward"], "__func__", None))
    name = getattr(function, "__globals__", {}).get("__name__", "")
    return str(name) == "compressed_tensors.quantization.lifecycle.forward"


def unhost(module: nn.Module) -> None:
    """Put the class back and drop the stack."""
    assert isinstance(module, Host)
    del module._modules[STACK]
    if getattr(module, WRAPPED, None) is Host.forward:  # put there while the adapters were
        setattr(module, WRAPPED, module.hosted_class.forward)
    module.__class__ = module.hosted_class  # pyright: ignore[reportAttributeAccessIssue]
