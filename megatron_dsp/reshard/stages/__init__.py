"""Activations on their way through the stages of a model: regions, how their stages are cut, and chunks under way."""
