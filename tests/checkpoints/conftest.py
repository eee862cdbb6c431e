"""Tests import huggingface_folders from this folder, however pytest was started."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
