"""Where the shard of an activation lies in each stage of a model, and what moves it in between: the cheapest plan."""

from megatron_dsp.planner.chain_plan import ANY, ChainPlan, PlannedStage, Reshard, cheapest_plan
from megatron_dsp.planner.costs import Cost
from megatron_dsp.planner.stage_needs import Attention, StageNeeds

__all__ = ["ANY", "Attention", "ChainPlan", "Cost", "PlannedStage", "Reshard", "StageNeeds", "cheapest_plan"]
