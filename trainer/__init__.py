"""Distils few-step students, and trains the built-in model that they start from."""
