"""The NVIDIA NeMo Agent Toolkit: its components driven by a Run, and ours among its own."""
