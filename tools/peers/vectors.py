"""Small layers and the results of the peers' own solvers on them, kept in tests/peer_vectors/.

If a peer is not installed, the parity tests use these records; if it is, they also run the peer and
compare it with its record.

    python -m tools.peers.vectors      run both peers again, write the records (after `make data`)
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools import peers

FOLDER = peers.ROOT / "tests" / "peer_vectors"
PROBLEMS = FOLDER / "problems.safetensors"
DAMP = 0.01

# (bits, group size or "channel", symmetric, act-order); act-order over groups means static groups
COINCIDE = [
    (4, "channel", False, False),
    (4, "channel", False, True),
    (4, "channel", True, True),
    (3, "channel", False, True),
    (4, 128, False, False),
    (4, 128, True, False),
    (4, 64, False, True),
    (4, 64, True, True),
    (4, 32, False, True),
    (2, 64, False, True),
    (8, 64, False, True),
]
# the peers compute a group's scale from weights that do not yet include the errors of its own block
STALE = [(4, 64, False, False), (4, 32, True, False)]


def name(case):
    bits, group_size, symmetric, act_order = case
    words = [f"{bits} bits", "channel" if group_size == "channel" else f"group {group_size}"]
    return ", ".join(words + ["symmetric"] * symmetric + ["act-order"] * act_order)


def options(case):
    """The same case as command-line options of a driver."""
    bits, group_size, symmetric, act_order = case
    words = ["--bits", bits, "--group-size", -1 if group_size == "channel" else group_size]
    words += ["--symmetric"] * symmetric + ["--act-order"] * act_order
    words += ["--static-groups"] * (act_order and group_size != "channel")
    return [*words, "--damp", DAMP]


def cases(weight):
    """The cases whose groups fit a weight."""
    columns = weight.shape[1]
    return [
        case
        for case in COINCIDE + STALE
        if case[1] == "channel" or columns % case[1] == 0 and columns > 1
    ]


def problems():
    """name -> (weight (out, in), inputs (tokens, in)), float32, from the record."""
    tensors = load_file(PROBLEMS)
    names = sorted({key.partition("/")[0] for key in tensors})
    return {
        each: (tensors[f"{each}/weight"].float(), tensors[f"{each}/inputs"].float())
        for each in names
    }


def recorded(peer):
    """(problem name, case name) -> {"codes", "scale", "zero"} of a peer's solver."""
    found = {}
    for key, tensor in load_file(FOLDER / f"{peer}.safetensors").items():
        problem, case, part = key.split("/")
        found.setdefault((problem, case), {})[part] = tensor
    return found


def versions(peer):
    """The versions with which a peer's record was made."""
    with safe_open(FOLDER / f"{peer}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["versions"])


def ask(peer, tasks):
    """Runs a peer's solver on [(weight, inputs, case)]: a list of results, and its versions.

    Each result has the tensors that the driver writes, and "loss", "seconds", "exact".
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs, written = [], {}
        for index, (weight, inputs, case) in enumerate(tasks):
            key = id(weight), id(inputs)
            if key not in written:
                written[key] = Path(folder) / f"in{index}.safetensors"
                tensors = {"weight": weight.contiguous(), "inputs": inputs.contiguous()}
                save_file(tensors, written[key])
            out = Path(folder) / f"out{index}.safetensors"
            jobs.append(["solve", written[key], out, *options(case)])
        answer = peers.run_many(peer, jobs, threads=1)  # more threads do not help on small layers
        results = [
            load_file(job[2]) | summary for job, summary in zip(jobs, answer["result"], strict=True)
        ]
    return results, answer["versions"]


def make_problems():
    """Layers that are small enough to store: random, of odd shape, nasty, and from the model."""
    generator = torch.Generator().manual_seed(13)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def correlated(tokens, columns):
        return randn(tokens, columns) @ randn(columns, columns) / columns**0.5

    made = {
        "random": (randn(16, 256) * 0.02, correlated(320, 256)),
        "odd shape": (randn(7, 129) * 0.02, correlated(160, 129)),
        "nasty": (nasty_weight(randn), nasty_inputs(correlated(160, 128))),
    }
    made |= real_problems()
    tensors = {}
    for each, (weight, inputs) in made.items():
        tensors[f"{each}/weight"] = weight if each == "nasty" else weight.half()
        tensors[f"{each}/inputs"] = inputs.half()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, PROBLEMS)


def nasty_weight(randn):
    weight = randn(14, 128) * 0.02
    weight[0] = 0
    weight[1, 5] = 40  # an outlier
    weight[2] = 0.02
    weight[3] = -0.02
    weight[4] *= 1e-38  # subnormal numbers
    weight[5] *= 1e-25
    weight[6] *= 1e6
    weight[7] = weight[7].abs()  # nothing negative
    weight[8, :64] = 0  # a group of zeros
    weight[9] = weight[9].bfloat16()
    weight[10, ::2] = 0
    weight[:, 17] *= 0.1  # so that no row has its extreme here: see nasty_inputs
    return weight


def nasty_inputs(inputs):
    inputs[:, 17] = 0  # a dead channel
    inputs[:, 3] = inputs[:, 90]  # twins
    inputs[:, 40] *= 30  # a massive activation
    inputs[:, 60] *= 1e-3
    return inputs


def real_problems():
    """Two layers of the embedded model, a few rows and columns of each, on calibration tokens."""
    from chapter13 import corpus, models

    model, tokenizer = models.load(device="cpu")
    wanted = {
        "real k_proj": ("model.layers.0.self_attn.k_proj", 16, 256, 320),
        "real down_proj": ("model.layers.15.mlp.down_proj", 16, 128, 192),
    }
    tokens = corpus.calibration_tokens(tokenizer, 2, 256)
    found = {}

    def catch(key, rows, columns, count):
        def hook(module, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            found[key] = module.weight.detach()[:rows, :columns], x[:count, :columns]

        return hook

    for key, (path, *sizes) in wanted.items():
        model.get_submodule(path).register_forward_pre_hook(catch(key, *sizes))
    with torch.inference_mode():
        model(tokens)
    return {key: (weight.clone(), inputs.clone()) for key, (weight, inputs) in found.items()}


def main():
    FOLDER.mkdir(exist_ok=True)
    make_problems()
    tasks, names = [], []
    for each, (weight, inputs) in problems().items():
        for case in cases(weight):
            tasks.append((weight, inputs, case))
            names.append(f"{each}/{name(case)}")
    for peer in peers.VERSIONS:
        results, versions = ask(peer, tasks)
        tensors = {}
        for key, result in zip(names, results, strict=True):
            if not result["exact"]:
                raise RuntimeError(f"{peer}, {key}: the codes do not give back its weight")
            tensors[f"{key}/codes"] = result["codes"].to(torch.uint8)
            tensors[f"{key}/scale"] = result["scale"]
            tensors[f"{key}/zero"] = result["zero"].to(torch.uint8)
        save_file(
            tensors,
            FOLDER / f"{peer}.safetensors",
            metadata={"versions": json.dumps(versions)},
        )
        print(f"{peer}: {len(names)} results, {versions}")


if __name__ == "__main__":
    main()
