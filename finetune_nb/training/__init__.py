"""From trajectories to a training job: curriculum, batches, jobs, the trainer."""
