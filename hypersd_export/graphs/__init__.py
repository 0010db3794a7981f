"""The graphs that are exported: one `nn.Module` per component, with Optimum's input and output names.

`graphs.spec` (no torch) says what a graph is; `graphs.components` (torch) makes them.
"""
