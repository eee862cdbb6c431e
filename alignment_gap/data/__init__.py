"""Data: text (sources and vocabularies), records (datasets on disk), batches (for training), tasks."""
