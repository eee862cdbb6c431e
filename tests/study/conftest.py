import pathlib
import sys

# Tests import planted from this folder, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
