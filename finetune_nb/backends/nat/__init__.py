"""The NVIDIA NeMo Agent Toolkit: its components under a Run (run.py), ours among its own (ours.py)."""
