"""Makes process_runs (here) and job_runs (tests/jobs) importable, however pytest was started."""

import pathlib
import sys

sys.path += [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "jobs")]
