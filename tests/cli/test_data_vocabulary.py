import json
import random

import pytest

from alignment_gap.cli.data import main
from alignment_gap.data.text import load_vocabulary
from alignment_gap.errors import UserError


def test_a_vocabulary_of_ones_own_pairs(tmp_path, capsys):
    rng = random.Random(0)
    words = [a + b for a in ("ka", "lo", "mi", "ne", "ru") for b in ("bel", "dor", "fin", "gam")]
    rows = [{"q": " ".join(rng.choices(words, k=9)), "good": "yes", "bad": "no"} for _ in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["alignment-gap data", "vocabulary", f"--source={tmp_path}/a.jsonl", f"--output={tmp_path}/new/own.model"]
    main([*command, "--fields=prompt=q,chosen=good,rejected=bad", "--size=290"])
    assert capsys.readouterr().out.endswith("own.model: 390 ids, of them 100 sentinels; pad 0, end 1, unknown 2\n")
    vocabulary = load_vocabulary(tmp_path / "new/own.model")
    assert vocabulary.decode(vocabulary.encode(rows[0]["q"])) == rows[0]["q"]


def test_what_is_not_given_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no source: give the path of a file or folder, or posts"):
        main(["alignment-gap data", "vocabulary", "--output=own.model"])
