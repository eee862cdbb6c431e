"""Data: text (sources, vocabularies), records (datasets on disk), batches (what training reads), tasks."""
