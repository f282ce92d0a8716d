"""A Ray cluster: rollouts in its workers, and training in an actor of it."""
