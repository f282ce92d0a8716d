"""GRPO on this machine: the policy that is sampled, and the jobs that train it.

Nothing is imported here, so that the config can be read where torch is missing.
"""
