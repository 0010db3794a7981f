"""Other projects' tools, each in an environment of its own (README.md)."""
