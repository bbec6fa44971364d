"""The linear layers of a model: `torch.nn.Linear`, and GPT-2's `Conv1D`, the same but transposed.

A loop over `nn.Linear` alone would leave GPT-2 unchanged: all linear layers of its blocks are
transformers' `Conv1D`, whose weight is (in_features, out_features). A loop over all subclasses
would include layers that other libraries have already quantized, so a subclass, such as Falcon's,
only counts if it computes the same as an `nn.Linear`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, by its name: transformers is not imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out_features, in_features), detached, without a copy."""
    weight = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight


def as_stored(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight (out_features, in_features) as the layer holds it, without a copy."""
    return weight.T if is_conv1d(layer) else weight


def put_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Gives a linear layer another weight, (out_features, in_features); the old tensor is kept."""
    put_parameter(layer, "weight", as_stored(layer, weight))


def put_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Gives a module a new parameter: the old one may be a view of a mapped file."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every linear layer, in the model's order, except the head.

    Linear layers are `nn.Linear`, its subclasses that compute the same, and `Conv1D`. The head
    (`model.get_output_embeddings()`, if the model has that) often shares the embeddings' memory and
    stays unquantized with them, as in bitsandbytes, GPTQ and AWQ.
    """
    head = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (_is_linear(module) or is_conv1d(module)) and module is not head
    }


def has_tied_head(model: nn.Module) -> bool:
    """Whether head and embeddings are one tensor in memory, whatever the config says."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return False
    return head.weight is embeddings.weight or (
        head.weight.data_ptr() == embeddings.weight.data_ptr() != 0
    )


def _is_linear(module: nn.Module) -> bool:
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return type(module) is nn.Linear
    own = {*module._parameters} <= {"weight", "bias"} and not module._buffers
    if not own or module._modules or type(module.weight) is not nn.Parameter:
        return False
    return module.weight.is_floating_point() and _computes_as_linear(module)


@torch.no_grad()
def _computes_as_linear(module: nn.Linear) -> bool:
    """Tests a copy with a small weight of whole numbers, whose sums are exact in any order."""
    small = copy.copy(module)
    weight, bias = torch.tensor([[1.0, -2.0, 4.0], [8.0, 3.0, -5.0]]), torch.tensor([7.0, -9.0])
    bias = None if module.bias is None else bias
    small._parameters = {"weight": nn.Parameter(weight), "bias": bias}
    small.in_features, small.out_features = 3, 2
    small._forward_pre_hooks, small._forward_hooks = {}, {}
    x = torch.tensor([[[1.0, 2.0, 3.0], [-4.0, 6.0, 5.0]]])
    try:
        y = type(module).forward(small, x)
    except Exception:  # it needs more than a plain linear layer
        return False
    return isinstance(y, torch.Tensor) and torch.equal(y, nn.functional.linear(x, weight, bias))


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of weights that hold many matrices in one tensor, (experts, rows, columns).

    transformers 5 stores mixtures of experts like this. Convolution kernels do not count.
    """
    return {
        f"{owner}.{name}".lstrip("."): parameter
        for owner, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


def check_all_reached(model: nn.Module) -> None:
    """Raises ValueError for a model that has weights of experts outside its linear layers."""
    if stacks := expert_stacks(model):
        name, stack = next(iter(stacks.items()))
        count = sum(parameter.numel() for parameter in stacks.values())
        raise ValueError(
            f"{name} holds the weights of {stack.shape[0]} experts in one tensor of shape "
            f"{tuple(stack.shape)}; {len(stacks)} such tensors, {count / 1e6:.1f}M weights, would "
            "stay unquantized: mixtures of experts in this form are not supported"
        )


def replace_layers(
    model: nn.Module,
    make: Callable[[str, nn.Module], nn.Module],
    progress: bool = True,
    description: str = "quantizing",
) -> nn.Module:
    """Replaces every linear layer with `make(name, layer)`; returns the model.

    If `make` fails, or the run is interrupted, the layers replaced so far are put back before the
    error is raised again. Shows a progress bar over the layers if `progress`. Raises ValueError if
    there is no linear layer (left), and for experts in one tensor.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or Conv1D to quantize, besides its head: "
            "was it quantized before?"
        )
    check_all_reached(model)
    from tqdm.auto import tqdm

    done = []
    try:
        for name, layer in tqdm(layers.items(), desc=description, disable=not progress):
            new = make(name, layer)
            done.append((name, layer))
            model.set_submodule(name, new)
    except BaseException:  # KeyboardInterrupt too
        for name, layer in done:
            model.set_submodule(name, layer)
        raise
    return model


@contextmanager
def watch(modules: dict[str, nn.Module], see: Callable[[str, tuple, dict], None]) -> Iterator[None]:
    """Inside the `with` block, `see(name, args, kwargs)` is called before a module computes."""
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Puts the model in eval mode, and afterwards back into its former mode."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)
