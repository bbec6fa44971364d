"""Records the results of AutoAWQ's own searches on small layers: tests/awq_vectors/.

    python tools/awq_vectors.py FOLDER      # the unpacked source package autoawq 0.2.9

AutoAWQ is no longer maintained, and its package cannot be imported beside today's transformers. Its
file awq/quantize/quantizer.py can: the searches do not need what it imports besides torch, so empty
modules replace these imports here.
"""

import importlib.util
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

VECTORS = Path(__file__).parent.parent / "tests" / "awq_vectors"
CASES = {"4-bit": (4, 16), "3-bit": (3, 32), "channel": (4, 64)}  # bits, group size


class Layer(torch.nn.Linear):
    """Returns copies: on a CPU AutoAWQ does not copy the weight before it scales it in place, and
    would put the scaled one back."""

    def state_dict(self):
        return {name: tensor.clone() for name, tensor in super().state_dict().items()}


def load(folder: Path):
    for name in (
        "awq.utils.calib_data",
        "awq.quantize.scale",
        "awq.utils.utils",
        "awq.modules.linear",
        "awq.utils.module",
    ):
        sys.modules[name] = MagicMock()
    spec = importlib.util.spec_from_file_location("quantizer", folder / "awq/quantize/quantizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.get_best_device = lambda: "cpu"
    return module.AwqQuantizer


def main(folder: Path) -> None:
    quantizer = load(folder)
    version = re.search(r'__version__ = "(.+)"', (folder / "awq/__init__.py").read_text())[1]
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(96, 64, generator=generator)
    x[:, ::16] *= 12
    tensors = {"x": x}
    for name, (bits, group_size) in CASES.items():
        layer = Layer(64, 64, bias=False)
        layer.weight.data = torch.randn(64, 64, generator=generator) ** 3 * 0.05
        tensors[f"{name} weight"] = layer.weight.data.clone()
        awq = quantizer.__new__(quantizer)
        awq.w_bit, awq.group_size, awq.zero_point, awq.duo_scaling = bits, group_size, True, False
        awq.max_chunk_memory, awq.n_parallel_calib_samples = 1 << 30, None
        with torch.no_grad():
            rounded, scale, zero = awq.pseudo_quantize_tensor(layer.weight.data)
            limit = awq._compute_best_clip(layer.weight.data, x)
            mean = x.abs().mean(0)
            s = awq._compute_best_scale(x, mean, mean, layer, [layer], layer(x))
        found = {"rounded": rounded, "scale": scale, "zero": zero, "limit": limit, "s": s}
        tensors |= {f"{name} {key}": value.contiguous() for key, value in found.items()}
    VECTORS.mkdir(exist_ok=True)
    metadata = {"autoawq": version, "torch": torch.__version__}
    save_file(tensors, VECTORS / "autoawq.safetensors", metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
