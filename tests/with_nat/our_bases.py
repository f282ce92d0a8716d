"""A pytest plugin: the Toolkit's interfaces are finetune_nb's, for its own tests and for its plugins, which subclass them."""

from nat.finetuning.interfaces import finetuning_runner, trainer_adapter, trajectory_builder

import finetune_nb

finetuning_runner.Trainer = finetune_nb.Trainer
trainer_adapter.TrainerAdapter = finetune_nb.TrainerAdapter
trajectory_builder.TrajectoryBuilder = finetune_nb.TrajectoryBuilder
