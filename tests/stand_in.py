"""A device that stands in for a GPU where there is none: it computes on the CPU, and is strict.

Its tensors say that they are elsewhere: on "card:0". As on a GPU they cannot become NumPy arrays,
and an operation that mixes them with the CPU's raises RuntimeError. So code that passes here moves
its tensors as a GPU wants it. What a GPU would compute, how fast, and whether PyTorch has the
operation there at all, this cannot tell.

    with stand_in.card() as device:
        model.to(device)

PyTorch has a door for devices written in Python, `_setup_privateuseone_for_python_backend`, which
is an experiment of theirs: `missing` says where it is not there.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
_SETUP = "_setup_privateuseone_for_python_backend"
# these may mix: copies, and indices, which a GPU takes from the CPU too
COPIES = {aten.copy_.default, aten._to_copy.default}
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}

missing = not hasattr(backend_registration, _SETUP)


class OnCard(torch.Tensor):
    """A tensor on the card; `held` is the one on the CPU that has its numbers."""

    @staticmethod
    def __new__(cls, held):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="card:0",
        )
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    @property
    def data(self):
        return OnCard(self.held.detach())

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)  # data type and shape; the numbers are in `held`
        self.held = other.held

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __repr__(self):
        return f"OnCard({self.held!r})"


def compute(operation, args, kwargs):
    """Runs an operation on the CPU; what it gives is on the card where its arguments are."""
    flat, structure = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    ours = [each for each in tensors if isinstance(each, OnCard)]
    theirs = [each for each in tensors if not isinstance(each, OnCard) and each.dim()]
    indexed = operation in BY_INDEX and isinstance(args[0], OnCard)
    if ours and theirs and operation not in COPIES and not indexed:
        raise RuntimeError(f"{operation} mixes tensors on the card with tensors on the CPU")

    on_card = bool(ours)
    if operation is aten.copy_.default:
        on_card = isinstance(args[0], OnCard)
    if kwargs.get("device") is not None:
        on_card = torch.device(kwargs["device"]).type == "card"
        flat = [
            torch.device("cpu") if isinstance(each, torch.device) and each.type == "card" else each
            for each in flat
        ]
    held = [each.held if isinstance(each, OnCard) else each for each in flat]
    args, kwargs = tree_unflatten(held, structure)
    result = operation(*args, **kwargs)
    if not on_card:
        return result
    known = {id(each.held): each for each in ours}  # an operation in place gives its argument back

    def wrap(tensor):
        return known[id(tensor)] if id(tensor) in known else OnCard(tensor)

    return tree_map_only(torch.Tensor, wrap, result)


class _Dispatch(TorchDispatchMode):
    """Operations that take no tensor on the card, but may make one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """What torch would do in C++ with a card that it does not have."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].held.tolist()
        if function is torch.Tensor.new_tensor and isinstance(args[0], OnCard):
            return OnCard(args[0].held.new_tensor(*args[1:], **kwargs))
        if function is torch.Tensor.cpu:
            return _move(args[0], torch.device("cpu"), None)
        if function is torch.Tensor.to:
            places = args[1:]
            if places and isinstance(places[0], torch.Tensor):
                places = places[0].device, places[0].dtype
            device, dtype, *_ = torch._C._nn._parse_to(
                *places, **{name: value for name, value in kwargs.items() if name != "copy"}
            )
            if device is not None:
                return _move(args[0], device, dtype)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return _move(function(*args, **kwargs), device, None)
        return function(*args, **kwargs)


def _move(tensor, device, dtype):
    dtype = dtype or tensor.dtype
    if device.type != tensor.device.type:
        return aten._to_copy.default(tensor, dtype=dtype, device=device)
    return tensor if dtype == tensor.dtype else aten._to_copy.default(tensor, dtype=dtype)


@contextmanager
def card():
    """In a `with` block "card" is a device of this machine; gives it."""
    if not hasattr(torch, "card"):
        getattr(backend_registration, _SETUP)("card")
    with (
        # the other ways to compute attention are written for true devices
        sdpa_kernel(SDPBackend.MATH),
        # tensors made in inference mode cannot be wrapped
        mock.patch("torch.inference_mode", torch.no_grad),
        _Dispatch(),
        _Moves(),
    ):
        yield torch.device("card")
