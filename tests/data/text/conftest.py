"""Small records in the original form of each source, and the containers that hold them."""

import gzip
import json
import pathlib

import pytest


def _write(folder: pathlib.Path, form: str, records: list[dict]) -> str:
    """Writes `records` to a container, and returns its location."""
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if form in ("jsonl", "json"):
        (folder / f"a.{form}").write_bytes(lines)
        return str(folder / f"a.{form}")
    if form == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
        return str(folder / "a.jsonl.gz")
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet", row_group_size=2)
        return str(folder / "a.parquet")
    import datasets

    dataset = datasets.Dataset.from_list(records)
    if form == "hugging_face":
        dataset.save_to_disk(folder / "saved")
    else:
        datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.fixture(scope="session")
def write():
    return _write


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test uses the network or leaves files in a cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


POST = {"id": "t3_1", "post": "My cat sleeps all day. Is it ill?", "title": "Cat sleeps", "subreddit": "pets"}


def _comparison(first: str, second: str, choice, info: dict = POST, split: str = "train", **more) -> dict:
    summaries = [{"text": text, "policy": "sup4", "note": "ok"} for text in (first, second)]
    extra = {"worker": "w1", "batch": "batch3", "split": split, "extra": {"confidence": 5}}
    return {"info": info, "summaries": summaries, "choice": choice} | extra | more


def _battle(question: str, first: str, second: str, winner: str, before: tuple = ((), ())) -> dict:
    def conversation(answer: str, turns: tuple) -> list[dict]:
        texts = [*turns, question, answer]
        return [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(texts)]

    return {
        "question_id": "q1",
        "model_a": "alpaca-13b",
        "model_b": "vicuna-13b",
        "winner": winner,
        "judge": "arena_user_1",
        "conversation_a": conversation(first, before[0]),
        "conversation_b": conversation(second, before[1]),
        "turn": 1 + len(before[0]) // 2,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1,
        "openai_moderation": {"flagged": False},
        "toxic_chat_tag": {"roberta-large": {"flagged": False}},
    }


def _dialogue(human: str, chosen: str, rejected: str) -> dict:
    return {name: f"\n\nHuman: {human}\n\nAssistant: {x}" for name, x in [("chosen", chosen), ("rejected", rejected)]}


@pytest.fixture(scope="session")
def comparison():
    return _comparison


@pytest.fixture(scope="session")
def battle():
    return _battle


@pytest.fixture(scope="session")
def dialogue():
    return _dialogue
