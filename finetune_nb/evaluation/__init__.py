"""Running a workflow over a dataset: datasets, the executor, the recorder of model calls, evaluators, the evaluation run."""
