"""Planning on hardware that is not here: what a job needs of a slice, and how long its steps take at best."""
