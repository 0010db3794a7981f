"""Parity of an exported bundle against torch: every component at each of the plan's timesteps, then the image."""
