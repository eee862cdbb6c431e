"""Jobs: a module for each kind, the folder that a job is, and the one assembly of a training run."""
