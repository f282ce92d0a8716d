"""Training on a Tinker-compatible service (Thinking Machines' cloud, SkyRL's open server): the weights are there, rollouts
and the curriculum here.

Nothing is imported here, so that the config can be read where the SDK is missing.
"""
