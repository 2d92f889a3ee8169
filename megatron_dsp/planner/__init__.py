"""Where the shard of an activation lies in each stage of a model, and what moves it in between: the cheapest plan."""

from megatron_dsp.planner.costs import Cost
from megatron_dsp.planner.needs import Attention, StageNeeds
from megatron_dsp.planner.plan import ANY, Plan, PlannedStage, Reshard, cheapest_plan

__all__ = ["ANY", "Attention", "Cost", "Plan", "PlannedStage", "Reshard", "StageNeeds", "cheapest_plan"]
