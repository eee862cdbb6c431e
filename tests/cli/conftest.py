"""Tests import process_runs from this folder and job_runs from that of the jobs, however pytest was started."""

import pathlib
import sys

sys.path += [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "jobs")]
