"""A small source of pairs of words, and its preparation, for tests of `data prepare` and of its job."""

import json

import numpy as np

from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import Limits, TextSourceConfig

WORDS = [f"w{i}" for i in range(50)]
LIMITS = Limits(prompt_length=6, response_length=5)


def write_pairs(path, count, seed=0):
    """Writes pairs of words with explicit prompts.

    Prompts have 1 to 8 words and repeat; responses have 1 to 5 words.
    """
    rng = np.random.default_rng(seed)

    def text(longest):
        return " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))

    prompts = [text(8) for _ in range(count // 2)]
    rows = []
    while len(rows) < count:
        row = {"prompt": str(rng.choice(prompts)), "chosen": text(5), "rejected": text(5)}
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def words_config(folder):
    """The config of 120 such pairs; writes them and their vocabulary to the folder."""
    write_pairs(folder / "pairs.jsonl", 120)
    (folder / "words.txt").write_text("\n".join(WORDS))
    return PrepareConfig(
        TextSourceConfig(str(folder / "pairs.jsonl")),
        vocabulary=str(folder / "words.txt"),
        limits=LIMITS,
        validation=0.2,
        records_per_file=25,
    )


def tree(folder):
    """The bytes of every file, except the lock and the job's own files, which hold settings and time."""
    files = (path for path in folder.rglob("*") if path.is_file())
    own = (".lock", "job.json", "done.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in own}
