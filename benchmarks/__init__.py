"""Latency and quality of what the export wrote, and the peers to compare it with."""
