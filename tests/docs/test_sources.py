"""The commands and the Python of docs/sources.md run in order, in a folder with files under the names that they use."""

import json
import pathlib
import random
import re
import shlex
import warnings

import pytest

from alignment_gap.cli.data import main
from alignment_gap.data.records import open_dataset
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.data.text import TASKS

pytestmark = pytest.mark.slow

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TEXT, flags=re.DOTALL)


def write(path: str, rows: list[dict]) -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which every block ran, and the names that the Python defined."""
    folder = tmp_path_factory.mktemp("docs")
    rng = random.Random(0)
    words = [a + b for a in ("ka", "lo", "mi", "ne", "ru") for b in ("bel", "dor", "fin", "gam")]
    asked = [" ".join(rng.choices(words, k=9)) for _ in range(200)]
    dialogues = [
        {name: f"\n\nHuman: {q}\n\nAssistant: {a}" for name, a in (("chosen", "yes"), ("rejected", "no"))}
        for q in asked
    ]
    scope: dict = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        write("pairs.jsonl", dialogues)
        write("downloads/harmlessness/train.jsonl", dialogues[:20])
        write("downloads/harmlessness/test.jsonl", dialogues[20:25])
        write("own.jsonl", [{"question": q, "good": "a", "bad": "b"} for q in asked[:30]])
        labels = ["ours", "reference", "both", ""] * 10
        judged = [
            {"post": q, "model": "m", "reference": "r", "preferred": x} for q, x in zip(asked, labels, strict=False)
        ]
        write("judged.jsonl", judged)
        for language, code in BLOCKS:
            if language == "python":
                exec(code, scope)
                continue
            for line in code.replace("\\\n", " ").strip().splitlines():
                # The page's vocabulary size suits a whole source, not the few words of this test.
                program, name, *arguments = shlex.split(line.replace("--size=32000", "--size=286"))
                assert (program, name) == ("alignment-gap", "data")
                main(["alignment-gap data", *arguments, *(["--workers=1"] if arguments[0] == "prepare" else [])])
        import seqio

        seqio.set_tfds_data_dir_override(None)
    return folder, scope


def test_the_commands_prepare_datasets(ran):
    folder, _ = ran
    assert open_dataset(folder / "own/train").card.provenance["dropped"] == {}
    assert open_dataset(folder / "judged/train").card.provenance["dropped"] == {"label dropped": 10, "tie": 10}
    assert open_dataset(folder / "prepared/train").card.count > 150
    built_in = open_dataset(folder / "runs/built_in/train")
    assert built_in.card.count == 2000 and rubric_of(built_in) is not None


def test_the_python_gives_a_pair_and_a_batch(ran):
    _, scope = ran
    assert scope["pairs"][0].responses == ("yes", "no")
    assert bytes(i - 3 for i in scope["encoded"].responses[0][:-1]) == b"yes" and scope["encoded"].responses[0][-1] == 1
    assert scope["batch"].prompts.shape == (2, 256) and scope["batch"].scores.tolist() == [[1, 0], [1, 0]]


def test_every_task_is_described():
    assert set(re.findall(r"`(\w+)`", TEXT)) >= set(TASKS) - {"pairs", "dialogues"}
