"""Prompts and rewards, samples, advantages and loss weights: the reinforcement-learning side of a step."""
