"""A Ray cluster: rollouts in its workers (executor.py), and training in an actor of it (trainer_adapter.py)."""
