"""Training on a Tinker-compatible service (Thinking Machines' cloud, SkyRL's open server): the weights are there, rollouts
and the curriculum here.

adapter.py (jobs) trains through service.py (session, errors, retries) with training.py (steps, metrics) what policy.py
samples; saved.py writes down which saved state of the service belongs to a checkpoint. Nothing is imported here, so that
the config can be read where the SDK is missing.
"""
