"""For `make test-gpu` and `make bench-gpu`: whether PyTorch has a GPU, and if not, why."""

import sys

import torch

from chapter13.models import find_device


def find(otherwise):
    """The GPU. If there is none, raises SystemExit with the reason and the sentence `otherwise`."""
    try:
        return find_device("cuda")
    except ValueError as error:
        sys.exit(f"{error}. {otherwise}.")


if __name__ == "__main__":
    device = find("Nothing was run")
    print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}")
