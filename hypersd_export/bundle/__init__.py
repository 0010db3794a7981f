"""Everything about a bundle that is not a model: digests, the stage cache, the atomic publish, manifest and card.

Needs the standard library alone; the exporters write with it and the torch-free runtime reads with it.
"""
