"""Load the course's embedded model, or any causal language model by its Hugging Face id."""

from pathlib import Path

import torch

from chapter13.download import require

EMBEDDED = "smollm2-135m"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def linear_weights(path: Path | str | None = None) -> dict[str, torch.Tensor]:
    """The weights of the embedded model's linear layers, by name, in the model's order.

    Returns name -> float32 tensor (out_features, in_features), without the embeddings and the head;
    e.g. "model.layers.0.mlp.down_proj.weight" (576, 1536). `path`: another safetensors file.

    The tensors are views of the mapped file: the first look at a value reads it from disk, and
    programs that run side by side share one copy in memory. Do not change them in place: that never
    reaches the file, but every holder of the tensor sees it and it takes memory of its own. Work on
    a `.clone()`.

    Raises FileNotFoundError when the data was not fetched yet.
    """
    from safetensors import safe_open

    if path is None:
        path = require(EMBEDDED) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("_proj.weight")]
        return {name: file.get_tensor(name) for name in sorted(names, key=_place)}


def _place(name: str) -> tuple[int, int]:
    """Sort key: layer 2 before layer 10, and inside a layer the order in which it computes."""
    _, _, layer, _, kind, _ = name.split(".")
    return int(layer), LINEARS.index(kind)
