"""What surrounds the graphs of captured passes: inputs, gradients, order. Here a replay computes again, on the CPU."""

from __future__ import annotations

import pytest
import torch
from recorders import Repeats
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.training.graph_capture import CapturedForward


class Model(nn.Module):
    """Two outputs, one without gradients, and a weight that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, side: dict[str, Tensor], *, power: int = 1) -> dict[str, Tensor]:
        y = torch.tanh(self.layer(x)) * self.scale**power + side["bias"]
        return {"y": y, "largest": y.argmax(-1)}


def make_models() -> tuple[Model, Model, Repeats]:
    """Twice the same; the second one is captured."""
    torch.manual_seed(0)
    model, captured = Model(), Model()
    captured.load_state_dict(model.state_dict())
    recorder = Repeats()
    captured.forward = CapturedForward(captured, recorder)
    return model, captured, recorder


def draw(rows: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(4, generator=generator).requires_grad_()
    return torch.randn(rows, 4, generator=generator), {"bias": bias}


def run(model: nn.Module, rows: int, seed: int, **keywords: int) -> list[Tensor | None]:
    """What a pass gives: outputs, and the gradients that have added up."""
    x, side = draw(rows, seed)
    outputs = model(x, side, **keywords)
    found = [outputs["y"].detach().clone(), outputs["largest"].clone()]
    outputs["y"].square().sum().backward()
    return [*found, side["bias"].grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


def assert_equal(expected: list[Tensor | None], found: list[Tensor | None]) -> None:
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


def test_passes_give_what_they_gave_and_gradients_add_up():
    """Over micro-batches: a gradient that lay in the memory of a graph would be overwritten by the next replay."""
    model, captured, recorder = make_models()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, captured)]
    for step in range(5):
        for micro in range(3):
            rows, seed = 2 + (step + micro) % 2, 10 * step + micro  # two shapes take turns
            assert_equal(run(model, rows, seed), run(captured, rows, seed))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.recorded == 4, "forward and backward of two shapes"
    assert recorder.replayed == 2 * (15 - 4), "all but the first two passes of each shape"


def test_a_shape_is_its_inputs_sizes_dtypes_and_values():
    _, captured, recorder = make_models()
    for count, (rows, power) in enumerate([(2, 1), (2, 2), (3, 2)], start=1):
        for seed in range(3):
            run(captured, rows, seed, power=power)
        assert recorder.recorded == 2 * count


def test_evaluation_runs_the_model_itself():
    model, captured, recorder = make_models()
    for seed in range(4):
        run(captured, 2, seed)
    recorded = recorder.recorded, recorder.replayed
    x, side = draw(2, 9)
    with torch.no_grad():
        assert torch.equal(captured(x, side)["y"], model(x, side)["y"])
    captured.eval()
    captured(x, side)["y"].sum().backward()
    assert (recorder.recorded, recorder.replayed) == recorded


def test_a_second_forward_before_backward_is_refused_while_the_first_one_is_needed():
    _, captured, _ = make_models()
    for seed in range(3):
        run(captured, 2, seed)
    first = captured(*draw(2, 0))
    for rows in (2, 2, 3, 3):  # another shape's first passes are as usual
        if rows == 2:
            with pytest.raises(dsp.UsageError, match="before the backward of the first"):
                captured(*draw(rows, 1))
        else:
            captured(*draw(rows, 1))
    with pytest.raises(dsp.UsageError, match="before the backward of the first"):
        captured(*draw(3, 1))  # and then it has the same memory
    del first
    loss = captured(*draw(2, 0))["y"].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(dsp.UsageError, match="runs once"):
        loss.backward()
    captured(*draw(2, 1))["y"].sum().backward()


@pytest.mark.parametrize("change", ["moved", "frozen"])
def test_other_weights_are_captured_anew(change):
    model, captured, recorder = make_models()
    for seed in range(3):
        assert_equal(run(model, 2, seed), run(captured, 2, seed))
    for m in (model, captured):
        if change == "moved":
            m.layer.weight.data = m.layer.weight.data + 1
        else:
            m.layer.weight.requires_grad_(False)
    for seed in range(3):
        assert_equal(run(model, 2, seed), run(captured, 2, seed))
    assert recorder.recorded == 4


def test_what_cannot_be_captured_is_refused():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Model()

    with pytest.raises(dsp.UsageError, match="capture the model in it"):
        dsp.capture(Wrapper())
    with pytest.raises(dsp.UsageError, match="weight scale is on cpu: CUDA graphs need a GPU"):
        dsp.capture(Model())
    gathered = Model()
    gathered.scale.ds_id = 0  # as DeepSpeed marks weights in ZeRO 3
    with pytest.raises(dsp.UsageError, match="ZeRO stage 3: it gathers and frees weights"):
        dsp.capture(gathered)
    _, captured, _ = make_models()
    x, side = draw(2, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            captured(x, side)
        with pytest.raises(dsp.UsageError, match="autocast"):
            captured(x, side)
    with pytest.raises(dsp.UsageError, match="can be hashed"):
        captured(x, side, power={1, 2})
