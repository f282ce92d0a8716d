"""Views of runs, epochs and rollouts, as HTML and text."""
