"""From a dataset row to a trajectory."""
