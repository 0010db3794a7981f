"""Distillation of a teacher into a few-step LoRA: configuration, networks, one step, and the run over all stages."""
