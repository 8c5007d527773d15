"""
A GPU that is not there: its tensors say they are on it, compute on the CPU, and refuse to meet tensors of the CPU.

Finds what a first run on a GPU would find: tensors made without a device, operands on two devices. Says nothing about
kernels, numerics or time. Registering the device changes the process for good, so use it in one of its own::

    python -m tests.on_pretended_gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

NAME = "pretended"
CROSSES_DEVICES = {aten.copy_.default, aten._to_copy.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

#: Operations for whose result the processor had to wait until the GPU was done, in order. Copies to it are not counted.
waits: list[str] = []


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; ``inner`` is where it really is."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=f"{NAME}:0"
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"on a pretended GPU: {self.inner!r}"

    def __deepcopy__(self, memo: Any) -> PretendedTensor:
        return PretendedTensor(self.inner.clone())

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


def check_devices(operation: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise as PyTorch does where tensors of a GPU and of the CPU meet. A CPU's numbers may come along, and indices."""
    given = [args[0], *args[2:], kwargs] if operation in INDEXES else [args, kwargs]
    tensors = [value for value in tree_leaves(given) if isinstance(value, torch.Tensor)]
    if any(t.dim() and not isinstance(t, PretendedTensor) for t in tensors):
        raise RuntimeError(
            f"{operation}: Expected all tensors to be on the same device, but found at least two devices"
        )


def must_wait(operation: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the processor needs the result: a number, a shape that depends on numbers, a copy on the CPU."""
    if operation is aten._to_copy.default:
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    masks = operation is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
    return masks or operation in WAITS


def compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what is inside; its result is where PyTorch would have put it."""
    if operation is aten._fused_sdp_choice.default:
        return 0  # the one that is made of other operations
    pretended = [value for value in tree_leaves((args, kwargs)) if isinstance(value, PretendedTensor)]
    if pretended and operation not in CROSSES_DEVICES:
        check_devices(operation, args, kwargs)
    if pretended and must_wait(operation, args, kwargs):
        waits.append(str(operation))
    lands_here = bool(pretended)
    if operation is aten.copy_.default:
        lands_here = isinstance(args[0], PretendedTensor)
    if kwargs.get("device") is not None:
        lands_here = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")} if lands_here else kwargs
    written = {id(tensor.inner): tensor for tensor in pretended}
    inside = tree_map(lambda value: value.inner if isinstance(value, PretendedTensor) else value, (args, kwargs))
    results = operation(*inside[0], **inside[1])
    arrived = [] if pretended else [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not lands_here:
            return value
        if any(value is tensor for tensor in arrived):
            value = value.clone()  # a copy to another device shares no memory
        return written.get(id(value)) if id(value) in written else PretendedTensor(value)

    return tree_map(placed, results)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Literals go to a device on ways that no operation can be seen on: torch.tensor, and lists as indices."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            return function(*args, **{**kwargs, "device": None}).to(device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], (list, tuple)):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
            args = (args[0], index, *args[2:])
        return function(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it, ``device="pretended"`` is a device, once :func:`register` was called."""
    with _Operations(), _Literals():
        yield


def register() -> None:
    """Make the device known to PyTorch, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot change its class in place
