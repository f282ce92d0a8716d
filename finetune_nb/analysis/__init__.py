"""What records say when they are computed with: which groups teach, how rollouts differ, whether a run beat another."""
