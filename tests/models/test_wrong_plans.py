"""Plans that are wrong for models of third parties: each is refused on all ranks, with the place that is wrong."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from test_models import CASES, skip_without
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import Boundary, Plan, Reduced, Slice

pytestmark = pytest.mark.models

Change = Callable[[Plan], Plan]
TOLERANCE = {"cogvideox": 1e-6}  # in fp64; it computes in fp32 inside


class Wrong(NamedTuple):
    """What is wrong with the plan of one of `CASES`, and what its refusal must name, as a regular expression."""

    case: str
    change: Change
    message: str
    inputs: Mapping[str, Any] = {}
    variant: Mapping[str, Any] = {}


def plan(**changes: Any) -> Change:
    return partial(replace, **changes)


def needs(name: str, **changes: Any) -> Change:
    """Of the modules with the pattern ``name``; all that may be sharded in the right plan may be still."""

    def change(right: Plan) -> Plan:
        wrong = replace(right.modules[name], **changes)
        return replace(right, modules={**right.modules, name: wrong}, shardable=right.dims)

    return change


def argument(name: str, key: Any, side: Slice | None) -> Change:
    """A side input that is said to be something else, or is not named."""

    def change(right: Plan) -> Plan:
        others = {place: kept for place, kept in right.modules[name].arguments.items() if place != key}
        return needs(name, arguments=others if side is None else {**others, key: side})(right)

    return change


def mask() -> dict[str, Tensor]:
    """Of all of ViViT's tokens in two samples."""
    return {"attention_mask": (torch.arange(2 * 126).view(2, 126) % 5 > 0).long()}


SPATIAL, TEMPORAL = "transformer_blocks.*", "temporal_transformer_blocks.*"
FRAMES, SPACE = "encoder.layer.*.temporal_attention", "encoder.layer.*.attention"
BLOCK, JOINT = "transformer_blocks.*", "transformer_blocks.*.attn1"
VIVIT = "layers.*.attention"
ROTARY = "image_rotary_emb"

WRONG = {
    "toto: a layer over sensors is said to be over times": Wrong(
        "toto", needs("layers.2", whole="T"), r"module 'layers\.2' is the first whose output differs"
    ),
    "toto: a layer over sensors is said to mix nothing": Wrong(
        "toto", needs("layers.2", whole=()), r"module 'layers\.2' is the first whose output differs"
    ),
    "toto: a layer over times is said to mix nothing": Wrong(
        # The planner never lets it: the next layer needs times whole. But what the plan says is wrong.
        "toto",
        needs("layers.0", whole=()),
        r"with T sharded in all modules that allow it, .*: module 'layers\.0' is the first whose output differs",
    ),
    "toto: the mask is not sliced": Wrong(
        "toto", argument("layers.2", "attention_mask", None), r"fails in module 'layers\.2': RuntimeError"
    ),
    "toto: the mask's dims in another order": Wrong(
        "toto",
        argument("layers.2", "attention_mask", Slice("(T B) heads rows columns")),
        r"module 'layers\.2' is the first whose output differs",
    ),
    "toto: the activation's dims in another order": Wrong(
        "toto", needs("layers.1", pattern="B T V D"), r"module 'layers\.1': argument 'inputs' should be .* dim 1 must be T="
    ),
    "toto: entered late": Wrong(
        "toto", plan(enter=Boundary("layers.1", {"inputs": "B V T D"})), r"module 'layers\.0' is called before the region"
    ),
    "toto: left early": Wrong(
        "toto",
        plan(leave=Boundary("layers.4", {0: "B V T D"}, after=True)),
        r"leave after 'layers\.4': the region is left before module 'layers\.5' has run",
    ),
    "axial: two attentions are swapped": Wrong(
        "axial",
        lambda right: replace(
            right,
            modules={
                "*.axial_attentions.0": right.modules["*.axial_attentions.1"],
                "*.axial_attentions.1": right.modules["*.axial_attentions.0"],
                "*.axial_attentions.2": right.modules["*.axial_attentions.2"],
            },
        ),
        # The two of the first block run with W sharded, which neither of them mixes.
        r"module '1\.axial_attentions\.0' is the first whose output differs",
    ),
    "axial: entered with two dims swapped": Wrong(
        "axial",
        plan(enter=Boundary("", {"input": "B H T W C"})),
        r"module '0\.axial_attentions\.0': argument 0 should be .* has shape",
    ),
    "axial summed: an attention is said to mix nothing": Wrong(
        "axial summed",
        lambda right: needs(next(name for name, needed in right.modules.items() if needed.whole == right.shard), whole=())(
            right
        ),
        r"module '0\.axial_attentions\.0' is the first whose output differs",
    ),
    "axial summed: left early": Wrong(
        "axial summed", plan(leave=Boundary("2", {0: "B T H W C"})), r"'2\.axial_attentions\.0' is called after the region"
    ),
    "latte: temporal blocks are said to mix nothing": Wrong(
        "latte",
        needs(TEMPORAL, whole=()),
        r"module 'temporal_transformer_blocks\.0' is the first whose output differs",
    ),
    "latte: the timestep of spatial blocks is not sliced": Wrong(
        "latte", argument(SPATIAL, "timestep", None), r"fails in module 'transformer_blocks\.0': RuntimeError"
    ),
    "latte: the timestep of temporal blocks is not sliced": Wrong(
        "latte", argument(TEMPORAL, "timestep", None), r"fails in module 'temporal_transformer_blocks\.0': RuntimeError"
    ),
    "latte: the text is not sliced": Wrong(
        "latte", argument(SPATIAL, "encoder_hidden_states", None), r"fails in module 'transformer_blocks\.0': RuntimeError"
    ),
    "latte: the text's dims in another order": Wrong(
        "latte",
        argument(SPATIAL, "encoder_hidden_states", Slice("(T B) L C")),
        r"module 'transformer_blocks\.0' is the first whose output differs",
    ),
    "latte: the timestep's patches in another order": Wrong(
        "latte",
        argument(TEMPORAL, "timestep", Slice("(S B) D")),
        r"module 'temporal_transformer_blocks\.0' is the first whose output differs",
    ),
    "latte: the table of positions is whole": Wrong(
        "latte",
        plan(attributes={}),
        r"fails in its own forward, after module 'transformer_blocks\.0': RuntimeError: The size of tensor",
    ),
    "latte: the table's dims in another order": Wrong(
        "latte",
        plan(attributes={"": {"temp_pos_embed": Slice("T 1 C")}}),
        r"module '': attribute 'temp_pos_embed' should be whole, 'T 1 C'",
    ),
    "latte: entered at the model's own input": Wrong(
        "latte",
        plan(sizes=None, enter=Boundary("", {"hidden_states": "B channels T height width"})),
        r"enter: the first pattern, 'B channels T height width', must name 'S'",
    ),
    "latte: entered there, with frames alone": Wrong(
        "latte",
        lambda right: Plan(
            shard="T",
            enter=Boundary("", {"hidden_states": "B channels T height width"}),
            leave=right.leave,
            modules={SPATIAL: right.modules[SPATIAL]},
            shardable=("T",),
        ),
        r"module 'transformer_blocks\.0': argument 'encoder_hidden_states' should be whole, .* has shape \(8, 5, 16\)",
    ),
    "latte: entered late": Wrong(
        "latte",
        plan(enter=Boundary("transformer_blocks.1", {0: "(B T) S C"})),
        r"module 'transformer_blocks\.0' is called before the region is entered at 'transformer_blocks\.1'",
    ),
    "latte: left early": Wrong(
        "latte",
        plan(leave=Boundary("transformer_blocks.1", {0: "(B T) S C"}, after=True)),
        r"module 'temporal_transformer_blocks\.1' is called after the region was left",
    ),
    "latte: left late": Wrong(
        "latte",
        plan(leave=Boundary("proj_out", {0: "(B T) S C"})),
        r"fails in its own forward, after module 'temporal_transformer_blocks\.1': RuntimeError",
    ),
    "timesformer: attention over time is said to mix nothing": Wrong(
        "timesformer",
        needs(FRAMES, whole=()),
        r"module 'encoder\.layer\.0\.temporal_attention' is the first whose output differs",
    ),
    "timesformer: the class token is not averaged": Wrong(
        "timesformer",
        needs(SPACE, outputs={0: "(B T) 1+S C"}),
        r"module 'encoder\.layer\.1\.attention' is the first whose input differs",
    ),
    "timesformer: the class token is summed": Wrong(
        "timesformer",
        needs(SPACE, outputs={0: Reduced("(B T) 1+S C", over="T")}),
        r"modules\['encoder\.layer\.\*\.attention'\]: outputs\[0\]: .* say by='mean'",
    ),
    "timesformer: no class token in space": Wrong(
        "timesformer",
        needs(SPACE, pattern="(B T) S C", outputs={0: "(B T) S C"}),
        r"module 'encoder\.layer\.0\.attention': argument 0 should be the shard of T=7, .* dim 1 must be S=25",
    ),
    "timesformer: the number of frames in the config is whole": Wrong(
        "timesformer", plan(attributes={}), r"fails in module 'encoder\.layer\.0', which is not planned: RuntimeError"
    ),
    "timesformer: entered before its embeddings": Wrong(
        "timesformer",
        plan(sizes=None, enter=Boundary("embeddings", {0: "B T channels height width"})),
        r"enter: the first pattern, 'B T channels height width', must name 'S'",
    ),
    "timesformer: entered with frames before patches": Wrong(
        "timesformer",
        plan(enter=Boundary("encoder.layer.0", {0: "B 1+(T S) C"})),
        r"module 'encoder\.layer\.0\.temporal_attention' is the first whose input differs",
    ),
    "timesformer: left with frames before patches": Wrong(
        "timesformer",
        plan(leave=Boundary("layernorm", {0: "B 1+(T S) C"})),
        r"the model's output differs, .* or leave= before 'layernorm'",
    ),
    "timesformer: left early": Wrong(
        "timesformer",
        plan(leave=Boundary("encoder.layer.1", {0: "B 1+(S T) C"})),
        r"module 'encoder\.layer\.1' is called after the region was left",
    ),
    "cogvideox: attention within a shard": Wrong(
        "cogvideox", needs(JOINT, attention=None), r"module 'transformer_blocks\.0\.attn1' is the first whose output differs"
    ),
    "cogvideox: the text after the video": Wrong(
        "cogvideox",
        needs(JOINT, attention="B heads N+L D"),
        r"module 'transformer_blocks\.0\.attn1' is the first whose output differs",
    ),
    "cogvideox: no text in attention": Wrong(
        "cogvideox",
        needs(JOINT, attention="B heads N D"),
        r"module 'transformer_blocks\.0\.attn1': scaled_dot_product_attention: its key should be a shard.* must be N=",
    ),
    "cogvideox: heads and tokens in another order": Wrong(
        "cogvideox",
        needs(JOINT, attention="B L+N heads D"),
        r"module 'transformer_blocks\.0\.attn1' is the first whose output differs",
    ),
    "cogvideox: rotary tables are not sliced": Wrong(
        "cogvideox", needs(BLOCK, arguments={}), r"fails in module 'transformer_blocks\.0\.attn1': RuntimeError"
    ),
    "cogvideox: one of two rotary tables is not sliced": Wrong(
        "cogvideox", argument(BLOCK, (ROTARY, 1), None), r"fails in module 'transformer_blocks\.0\.attn1': RuntimeError"
    ),
    "cogvideox: a rotary table's dims in another order": Wrong(
        "cogvideox",
        argument(BLOCK, (ROTARY, 0), Slice("D N")),
        r"module 'transformer_blocks\.0': argument \('image_rotary_emb', 0\) should be whole, 'D N'",
    ),
    "cogvideox: the text is sliced": Wrong(
        "cogvideox",
        argument(BLOCK, "encoder_hidden_states", Slice("B N C")),
        r"module 'transformer_blocks\.0': argument 'encoder_hidden_states' should be whole, .* dim 1 must be N=",
    ),
    "cogvideox: entered before its patches": Wrong(
        "cogvideox",
        plan(enter=Boundary("patch_embed", {1: "B T channels height width"})),
        r"enter: the first pattern, 'B T channels height width', must name 'N'",
    ),
    "cogvideox: left late": Wrong(
        "cogvideox",
        plan(leave=Boundary("", {0: "B N C"}, after=True)),
        r"in its own forward, after module 'transformer_blocks\.1': Run",
    ),
    "vivit: attention that is not seen": Wrong(
        "vivit",
        plan(),
        r"module 'layers\.0\.attention' has attention=, but called no scaled_dot_product_attention",
        variant={"attention": "eager"},
    ),
    "vivit: a mask of all tokens that is sliced": Wrong(
        "vivit",
        argument(VIVIT, "attention_mask", Slice("B one rows 1+N")),
        r"module 'layers\.0\.attention': scaled_dot_product_attention: attn_mask of shape .* pass masks whole",
        inputs=mask(),
    ),
    "vivit: the class token last": Wrong(
        "vivit", needs(VIVIT, attention="B heads N+1 D"), r"module 'layers\.0\.attention' is the first whose output differs"
    ),
    "vivit: entered without the class token": Wrong(
        "vivit",
        plan(enter=Boundary("layers.0", {0: "B N C"})),
        r"module 'layers\.0\.attention': argument 0 should be the shard of N=126",
    ),
}
RIGHT = {
    **{name: Wrong(name, plan(), "") for name in CASES},
    "vivit with a mask": Wrong("vivit", plan(), "", inputs=mask()),
}


def _verified(wrong: Wrong) -> str:
    """What `dsp.verify` says of a plan."""
    case, mesh = CASES[wrong.case], dsp.Mesh(sequence=dist.get_world_size())
    case = case._replace(variant={**case.variant, **wrong.variant})
    model: nn.Module = case.make_model(case.uneven).double()
    inputs = {**importlib.import_module(case.example).make_inputs(**case.uneven), **wrong.inputs}
    inputs = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    right = importlib.import_module(case.example).make_plan(model)
    try:
        return str(dsp.verify(model, inputs, plan=wrong.change(right), mesh=mesh, tolerance=TOLERANCE.get(wrong.case)))
    except dsp.UsageError as error:
        return f"refused: {error}"


def _all_verified(kind: str) -> dict[str, str]:
    plans = RIGHT if kind == "right" else WRONG
    return {name: _verified(wrong) for name, wrong in plans.items()}


@pytest.fixture(scope="module")
def verified(ranks) -> Callable[[str], list[dict[str, str]]]:
    for case in CASES.values():
        skip_without(case.package)
    found = {kind: ranks(2, _all_verified, kind) for kind in ("right", "wrong")}
    return found.__getitem__


@pytest.mark.parametrize("name", RIGHT)
def test_right_plans_pass(verified, name):
    for found in verified("right"):
        assert found[name].startswith("largest differences")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_plans_are_refused_alike_with_what_is_wrong(verified, name):
    own, other = (found[name] for found in verified("wrong"))
    assert own == other
    assert own.startswith("refused: ")
    assert re.search(WRONG[name].message, own), own
