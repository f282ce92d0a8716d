"""GRPO on this machine: adapter.py (jobs) trains with grpo.py (the loss) what policy.py samples from.

sequences.py turns trajectories into token sequences; batching.py decides which requests are sampled together and
sampling.py does it. Nothing is imported here, so that the config can be read where torch is missing.
"""
