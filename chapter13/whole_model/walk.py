"""A causal language model, walked block by block with calibration text.

GPTQ, AWQ and their like need the inputs of each linear layer. Those of all layers would take many
times the model's memory, so only the hidden states between two blocks are kept: they go into a
block, its layers are quantized, and what comes out of the quantized block goes into the next.
Later layers thus learn from inputs that carry the errors of earlier ones.

There is no table of architectures. The blocks are the model's longest list of modules that hold
linear layers, and which layers read the same input shows when a few tokens pass through.
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
    """Ends a pass at the place whose tensor was wanted; carries the tensor."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks.

    Of all `nn.ModuleList`s the one that holds the most linear layers; the outer one, where one lies
    within another. Raises ValueError where none holds any.
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
            f"{type(model).__name__} has no list of blocks with linear layers to walk through: "
            "this takes a causal language model of transformers that is not quantized yet"
        )
    return found


def outside_blocks(model: nn.Module) -> list[str]:
    """The names of the linear layers, but the head, that no block holds: OPT-350m has two."""
    blocks, _ = find_blocks(model)
    return [name for name in linear_layers(model) if not name.startswith(f"{blocks}.")]


class Walk:
    """Calibration text on its way through the blocks of a model, one block after the other.

    `tokens`: int64 (sequences, length), or None for a method that reads no text: then a few tokens
    are only used to try out blocks. The walk holds the hidden states before the next block:
    float32, (sequences, length, hidden size) for each batch. The model is in eval mode from then
    on; only the function that `visit` calls back changes its layers.

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

        Layers that read the very same input, such as the projections to queries, keys and values,
        stand in one list. Raises ValueError where a layer is not reached at all.
        """
        block = self.blocks[index]
        layers = linear_layers(block)
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def see(name, args, kwargs):
            x = args[0]
            for tensor, names in seen:  # all are kept: a freed one's memory would serve another
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
                "rounds, affine or nf4"
            )
        return [names for _, names in seen]

    def visit(self, index: int, change: Callable[[list[str], Iterator[torch.Tensor]], None]):
        """Sends the hidden states through a block, and lets `change` quantize it on the way.

        Before a group of layers (see `groups`) computes, `change(names, inputs)` is called.
        `inputs` yields what reaches them, (tokens, in_features), batch by batch. The layers that
        it changes then compute with their new weights, so the next group's inputs are those of a
        block that is quantized so far.

        Text that fits into one batch passes once.
        """
        # The first batch waits inside a hook at each group while the others run up to there from
        # the block's beginning. Running all of them for each group would be plainer, and would
        # send a single batch through most of the block several times.
        fetching = None  # the layer whose input another batch is under way to fetch

        def fetch(batch, layer):
            nonlocal fetching
            fetching = layer
            try:
                self.through(index, batch)
            except _StopForward as reached:
                return reached.args[0]
            finally:
                fetching = None
            raise RuntimeError(f"batch {batch} takes another way through the block than the first")

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
        """What reaches each linear layer of a block: name -> (tokens, in_features)."""
        groups = self.groups(index)
        seen = self.calls(index, [names[0] for names in groups])
        joined = {first: tokens_of(calls) for first, calls in seen.items()}
        return {name: joined[names[0]] for names in groups for name in names}

    def try_out(self, index: int) -> None:
        """Lets a block compute a few tokens as it is now.

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
        """What comes out of a block for one batch of the hidden states: of the same shape."""
        return self._run(index, self.hidden[batch], self._calls[batch])

    @torch.no_grad()
    def _run(self, index, hidden, calls):
        args, kwargs = calls[index]
        with _float32(self.blocks[index]):
            out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def _enter(self, tokens):
        """(hidden states before the first block, how each block is called) for these tokens.

        The model runs, but its blocks only note what they are called with besides hidden states
        (masks, positions) and hand these on. After the last block the run ends.
        """
        calls, entered, passed_on = [], [], []

        def note(block, *args, **kwargs):
            hidden, *args = args if args else [kwargs.pop("hidden_states")]
            entered.append(hidden)
            given = [*args, *kwargs.values()]
            if any(value is other for value in given for other in passed_on):
                raise ValueError(f"{kind}: its blocks hand on more than their hidden states")
            calls.append(_as_float32((tuple(args), kwargs)))
            if type(block) not in self._extras:  # what such blocks return: the first one shows it
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
                f"{kind} cannot be walked through block by block, at block {len(calls)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for block in self.blocks:
                del block.forward
        raise ValueError(
            f"the text passes through {len(calls)} of the {len(self.blocks)} blocks in {self.name}"
        )


def tokens_of(calls: list[tuple[tuple, dict]]) -> torch.Tensor:
    """What reached a linear layer in some calls of it: (tokens, in_features)."""
    return torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args, _ in calls])


@contextmanager
def _float32(block):
    """Lets a block compute in float32: parameters in fewer bits are copies while it lasts."""
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
    """Tensors in fewer bits, wherever they stand in tuples and dicts, as float32."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    if isinstance(value, dict):
        return {key: _as_float32(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_float32(item) for item in value)
    return value
