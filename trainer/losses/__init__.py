"""Losses of distillation: pure functions on tensors, with the paper and the equation of each."""
