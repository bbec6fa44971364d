"""Sends calibration text through a causal language model, block by block.

GPTQ and AWQ need the inputs of each linear layer. The inputs of all layers together would take too
much memory, so only the hidden states between two blocks are kept: they enter a block, its layers
are quantized, and the outputs of the quantized block enter the next one. Later layers thus learn
from inputs that contain the errors of earlier ones.

There is no table of architectures. The blocks are the list of modules with the most linear layers,
and a few tokens that pass through a block show which of its layers read the same input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import nn

from chapter13.corpus import check_tokens
from chapter13.whole_model.layers import linear_layers, watch

TOKENS_AT_ONCE = 4096  # in one pass through a block
_PROBE = 8  # tokens that show which layers read the same input


class _StopForward(Exception):
    """Ends a forward pass early, where the needed tensor is reached; carries that tensor."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks.

    This is the `nn.ModuleList` that holds the most linear layers; of nested lists the outer one.
    Raises ValueError if none holds any.
    """
    wanted = linear_layers(model)
    found, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(layer.startswith(f"{name}.") for layer in wanted)
            if inside > most:
                found, most = (name, module), inside
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with linear layers: it must be a causal "
            "language model of transformers that is not quantized yet"
        )
    return found


def outside_blocks(model: nn.Module) -> list[str]:
    """The names of the linear layers outside the blocks, except the head; OPT-350m has two."""
    blocks, _ = find_blocks(model)
    return [name for name in linear_layers(model) if not name.startswith(f"{blocks}.")]


class Walk:
    """Calibration text that passes through the blocks of a model, one block after the other.

    `tokens`: int64 (sequences, length), or None for a method that reads no text: then a few tokens
    are used, only to try out blocks. The walk holds the hidden states before the next block:
    float32, (sequences, length, hidden size) for each batch. The model stays in eval mode; the walk
    itself does not change its layers.

    Raises TypeError or ValueError for tokens of another data type or shape, or beyond the
    vocabulary, and ValueError as `find_blocks`.
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor | None):
        self.name, self.blocks = find_blocks(model)
        self.model = model.eval()
        self._extras: dict[type, tuple | None] = {}
        if tokens is None:
            tokens = torch.arange(_PROBE)[None] % model.get_input_embeddings().num_embeddings
            self._probe = self._enter(tokens)
            self.hidden, self._calls = [], []
            return
        check_tokens(model, tokens, "calibration tokens")
        self._probe = self._enter(tokens[:1, :_PROBE])
        batches = tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))
        entered = [self._enter(batch) for batch in batches]
        self.hidden = [hidden for hidden, _ in entered]
        self._calls = [calls for _, calls in entered]

    def groups(self, index: int) -> list[list[str]]:
        """The names of a block's linear layers, in the order in which inputs reach them.

        Layers that read the same input, such as the projections to queries, keys and values, are in
        one list. Raises ValueError if a layer is not reached at all.
        """
        block = self.blocks[index]
        layers = linear_layers(block)
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def see(name, args, kwargs):
            x = args[0]
            for tensor, names in seen:  # all are kept: the memory of a freed one could be reused
                if tensor is x:
                    names.append(name)
                    return
            seen.append((x, [name]))

        with watch(layers, see):
            self._run(index, *self._probe)
        missing = set(layers) - {name for _, names in seen for name in names}
        if missing:
            raise ValueError(
                f"{self.name}.{index}: no text reaches {len(missing)} of its linear layers, "
                f"first {min(missing)}, so they cannot be calibrated: use a method that only "
                "rounds, such as affine or nf4"
            )
        return [names for _, names in seen]

    def visit(self, index: int, change: Callable[[list[str], Iterator[torch.Tensor]], None]):
        """Sends the hidden states through a block, and lets `change` quantize its layers.

        Before a group of layers (see `groups`) computes, `change(names, inputs)` is called.
        `inputs` yields the inputs of these layers, (tokens, in_features), batch by batch. The
        layers that it changes compute with their new weights, so the inputs of the next group come
        from layers that are already quantized.

        Text that fits into one batch passes through the block once.
        """
        # The first batch waits inside a hook at each group while the others run from the block's
        # beginning up to that group. Running all of them for each group would be simpler, but would
        # send a single batch through most of the block several times.
        fetching = None  # the layer whose input another batch is now fetching

        def fetch(batch, layer):
            nonlocal fetching
            fetching = layer
            try:
                self.through(index, batch)
            except _StopForward as reached:
                return reached.args[0]
            finally:
                fetching = None
            raise RuntimeError(f"batch {batch} takes another path through the block than the first")

        def reach(names, layer, x):
            x = x.reshape(-1, x.shape[-1])
            if fetching is layer:
                raise _StopForward(x)
            if fetching is None:
                others = (fetch(batch, layer) for batch in range(1, len(self.hidden)))
                change(names, chain([x], others))

        hooks = []
        try:
            for names in self.groups(index):
                layer = self.blocks[index].get_submodule(names[0])
                hook = lambda module, args, names=names: reach(names, module, args[0])  # noqa: E731
                hooks.append(layer.register_forward_pre_hook(hook))
            first = self.through(index, 0)
        finally:
            for hook in hooks:
                hook.remove()
        self.hidden = [first, *(self.through(index, b) for b in range(1, len(self.hidden)))]

    def calls(self, index: int, names: list[str]) -> dict[str, list[tuple[tuple, dict]]]:
        """(args, kwargs) of each named module of a block, for each batch of the hidden states."""
        block, seen = self.blocks[index], {name: [] for name in names}
        modules = {name: block.get_submodule(name) for name in names}
        with watch(modules, lambda name, args, kwargs: seen[name].append((args, kwargs))):
            for batch in range(len(self.hidden)):
                self.through(index, batch)
        return seen

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        """The inputs of each linear layer of a block: name -> (tokens, in_features)."""
        groups = self.groups(index)
        seen = self.calls(index, [names[0] for names in groups])
        joined = {first: tokens_of(calls) for first, calls in seen.items()}
        return {name: joined[names[0]] for names in groups for name in names}

    def try_out(self, index: int) -> None:
        """Runs a few tokens through a block in its present form.

        Raises ValueError if it fails, or gives NaN or Inf: which block, and why.
        """
        try:
            out = self._run(index, *self._probe)
        except Exception as error:
            raise ValueError(
                f"{self.name}.{index} ({type(self.blocks[index]).__name__}) does not compute with "
                f"quantized layers: {type(error).__name__}: {error}"
            ) from error
        if not out.isfinite().all():
            raise ValueError(f"{self.name}.{index} gives NaN or Inf with quantized layers")

    def advance(self, index: int) -> None:
        """Sends the hidden states through a block in its present form."""
        self.hidden = [self.through(index, batch) for batch in range(len(self.hidden))]

    def through(self, index: int, batch: int) -> torch.Tensor:
        """The output of a block for one batch of the hidden states, in the same shape."""
        return self._run(index, self.hidden[batch], self._calls[batch])

    @torch.no_grad()
    def _run(self, index, hidden, calls):
        args, kwargs = calls[index]
        with _float32(self.blocks[index]):
            out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def _enter(self, tokens):
        """(hidden states before the first block, other arguments of each block) for these tokens.

        The model runs, but its blocks only record their arguments besides the hidden states (masks,
        positions) and return the hidden states unchanged. The run ends at the last block.
        """
        calls, entered, passed_on = [], [], []

        def note(block, *args, **kwargs):
            hidden, *args = args if args else [kwargs.pop("hidden_states")]
            entered.append(hidden)
            given = [*args, *kwargs.values()]
            if any(value is other for value in given for other in passed_on):
                raise ValueError(
                    f"{kind}: its blocks pass on more than their hidden states, which is not "
                    "supported"
                )
            calls.append(_as_float32((tuple(args), kwargs)))
            if type(block) not in self._extras:  # the first block shows what such blocks return
                with _float32(block):
                    out = type(block).forward(block, hidden.float(), *args, **kwargs)
                self._extras[type(block)] = out[1:] if isinstance(out, tuple) else None
            if len(calls) == len(self.blocks):
                raise _StopForward
            extras = self._extras[type(block)]
            passed_on.extend(extra for extra in extras or () if extra is not None)
            return hidden if extras is None else (hidden, *extras)

        kind = type(self.model).__name__
        try:
            for block in self.blocks:
                block.forward = partial(note, block)
            self.model(tokens.to(self.model.device), use_cache=False)
        except _StopForward:
            return entered[0].float(), calls
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"{kind} cannot be run block by block; it failed at block {len(calls)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for block in self.blocks:
                del block.forward
        raise ValueError(
            f"the text only reaches {len(calls)} of the {len(self.blocks)} blocks in {self.name}"
        )


def tokens_of(calls: list[tuple[tuple, dict]]) -> torch.Tensor:
    """The inputs of a linear layer in some of its calls: (tokens, in_features)."""
    return torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args, _ in calls])


@contextmanager
def _float32(block):
    """Inside the `with` block, 16-bit parameters of a block are replaced by float32 copies."""
    narrow = [p for p in block.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    originals = [parameter.data for parameter in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, original in zip(narrow, originals, strict=True):
            parameter.data = original


def _as_float32(value):
    """16-bit tensors as float32, also inside tuples, lists and dicts."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    if isinstance(value, dict):
        return {key: _as_float32(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_float32(item) for item in value)
    return value
