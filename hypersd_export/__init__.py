"""Fuse a few-step LoRA into a diffusion pipeline and ship it with its schedule fixed inside."""

__version__ = "0.1.0"
