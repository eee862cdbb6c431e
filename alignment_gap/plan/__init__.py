"""Plans for hardware that is not here: whether a job fits a slice, and how long its steps take at best."""
