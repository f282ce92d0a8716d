"""A Trainer that somebody else wrote, and groups for it to choose from."""

from __future__ import annotations

import finetune_nb as ft
from finetune_nb.interfaces import Trainer


def ten_groups(epoch):
    return {str(i): [i / 10, i / 10 + 0.5] for i in range(10)}


class ForeignTrainer(Trainer):
    """Keeps the groups with a reward above one half, and knows nothing of records."""

    async def run_epoch(self, epoch, run_id):
        collection = await self.collect(epoch, run_id)
        kept = [group for group in collection.trajectories if group[-1].reward > 0.5]
        return await self.trainer_adapter.submit(ft.TrajectoryCollection(trajectories=kept, run_id=run_id))

    async def collect(self, epoch, run_id):
        await self.trajectory_builder.start_run(run_id, {"epoch": epoch})
        return await self.trajectory_builder.finalize(run_id, {"epoch": epoch})

    async def run(self, num_epochs):
        return []

    async def get_metrics(self, run_id):
        return {}

    async def cleanup(self):
        self.cleaned = True

    def log_progress(self, epoch, metrics, output_dir=None):
        self.logged = [*getattr(self, "logged", []), epoch]
