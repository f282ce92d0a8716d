"""GRPO on this machine: adapter.py (jobs) trains with grpo.py (the loss) what policy.py samples from.

batching.py decides which requests are sampled together, and sampling.py does it. What a job learns from is experience.py's,
two floors up. Nothing is imported here, so that the config can be read where torch is missing.
"""
