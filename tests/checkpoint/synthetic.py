"""A checkpoint of safetensors of any size, made up tensor by tensor.

    python tests/checkpoint/synthetic.py FOLDER --parameters 2e9 [--kinds weight exp_avg exp_avg_sq]

It is of a model of `LAYERS` layers and a table of tokens, and says how the tensor axis divides them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_dsp.checkpoint.formats import safetensors
from megatron_dsp.checkpoint.formats.source import Source, Target
from megatron_dsp.checkpoint.parameters import Parameter
from megatron_dsp.checkpoint.state import WEIGHT, Training

LAYERS = 24
OPTIONS = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}


def source(parameters: float, kinds: tuple[str, ...]) -> Source:
    """About so many parameters. What a tensor holds follows from its kind and name."""
    hidden = max(16, 16 * round(math.sqrt(parameters / (LAYERS * 12 + 8)) / 16))
    shapes = {"embedding.table": ((8 * hidden, hidden), 0)}
    for layer in range(LAYERS):
        of_layer = {
            "query.weight": ((3 * hidden, hidden), 0),
            "out.weight": ((hidden, hidden), 1),
            "up.weight": ((4 * hidden, hidden), 0),
            "down.weight": ((hidden, 4 * hidden), 1),
            "norm.weight": ((hidden,), None),
        }
        shapes |= {f"layers.{layer}.{name}": each for name, each in of_layer.items()}
    numbers = {(kind, name): number for number, (kind, name) in enumerate((kind, name) for kind in kinds for name in shapes)}

    def read(kind: str, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(numbers[kind, name])
        return torch.randn(shapes[name][0], generator=generator)

    of_model = {name: Parameter(*each) for name, each in shapes.items()}
    layers = ["embedding", *(f"layers.{layer}" for layer in range(LAYERS))]
    training = Training(iteration=10, consumed_samples=80, step=10, lr=1e-4, options=OPTIONS)
    return Source(of_model, kinds, training, layers, {}, read)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a synthetic checkpoint of safetensors.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=2e9)
    parser.add_argument("--kinds", nargs="+", default=[WEIGHT])
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    made = source(given.parameters, tuple(given.kinds))
    safetensors.save(made, given.folder, Target())
    print(f"{sum(math.prod(parameter.shape) for parameter in made.parameters.values()):,} parameters in {given.folder}")


if __name__ == "__main__":
    main()
