import gzip
import itertools
import json
import pickle
import re

import pytest

from alignment_gap.data.text import TextSourceConfig, open_source, source_digest
from alignment_gap.data.text.containers import open_records, split_name
from alignment_gap.errors import UserError

FORMS = ["jsonl", "json", "jsonl.gz", "parquet", "hugging_face"]
ROWS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(11)]


def values(records, *bounds) -> list[dict]:
    return [dict(record.values) for record in records.read(*bounds)]


@pytest.mark.parametrize("form", FORMS)
def test_every_container_gives_the_records_with_their_numbers(write, tmp_path, form):
    records = open_records(write(tmp_path, form, ROWS))
    assert len(records) == 11 and values(records) == ROWS
    assert [record.where.rpartition(":")[2] for record in records.read()] == [str(n) for n in range(1, 12)]
    assert records.files and all(file.is_file() for file in records.files) and not records.identity


@pytest.mark.parametrize("form", [*FORMS, "dictionary"])
def test_ranges_that_share_nothing_are_the_whole_in_any_process(write, tmp_path, form):
    records = pickle.loads(pickle.dumps(open_records(write(tmp_path, form, ROWS))))
    for cuts in [(0, 11), (0, 1, 2, 7, 11), (0, 4, 5, 11, 22), (0, 10, 13)]:
        ends = [min(cut, len(records)) for cut in cuts] + [len(records)]
        parts = [list(records.read(a, b)) for a, b in itertools.pairwise(ends)]
        assert list(itertools.chain(*parts)) == list(records.read())
    assert values(records, 3, 3) == [] and values(records, 9) == values(records)[9:]


def test_a_range_far_into_a_file_starts_there(tmp_path):
    rows = [f'{{"n": {i}}}' for i in range(10_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    records = open_records(str(tmp_path / "a.jsonl"))
    for start, stop in [(4095, 4098), (4096, 4097), (8191, 8200), (9999, 10_000), (9999, None), (5000, None)]:
        read = list(records.read(start, stop))
        assert [record.values["n"] for record in read] == list(range(start, stop or 10_000))
        assert read[0].where.endswith(f":{start + 1}")


def test_a_gzip_file_is_opened_once_for_ranges_in_their_order(write, tmp_path, monkeypatch):
    records = open_records(write(tmp_path, "jsonl.gz", [{"n": n} for n in range(20)]))
    assert len(records) == 20
    opened = []
    monkeypatch.setattr(gzip, "open", lambda *arguments, real=gzip.open: opened.append(1) or real(*arguments))

    def numbers(*bounds):
        return [value["n"] for value in values(records, *bounds)]

    # Other processes read the ranges in between.
    for start in (0, 3, 9, 12, 18):
        assert numbers(start, start + 3) == list(range(start, min(start + 3, 20)))
    assert len(opened) == 1
    # These read from the beginning: an earlier range, two readers at once, and a range after a reader that stopped
    # early.
    assert numbers(2, 5) == [2, 3, 4]
    two = zip(records.read(5, 8), records.read(5, 8), strict=True)
    assert [(a.values["n"], b.values["n"]) for a, b in two] == [(5, 5), (6, 6), (7, 7)]
    next(iter(records.read(8, 20)))
    assert numbers(8, 10) == [8, 9]
    assert [record.values["n"] for record in pickle.loads(pickle.dumps(records)).read(10, 12)] == [10, 11]


def test_a_folder_of_shards_and_several_locations_are_read_in_order(write, tmp_path):
    (tmp_path / "shards").mkdir()
    for number, name in enumerate(["b.jsonl", "a.jsonl.gz", "c.parquet"]):
        (tmp_path / "x").mkdir(exist_ok=True)
        part = write(tmp_path / "x", name.split(".", 1)[1], ROWS[number * 3 : number * 3 + 3])
        (tmp_path / "x" / part).rename(tmp_path / "shards" / name)
    assert values(open_records(str(tmp_path / "shards"))) == ROWS[3:6] + ROWS[:3] + ROWS[6:9]
    both = f"{tmp_path}/shards/c.parquet, {tmp_path}/shards/b.jsonl"
    assert values(open_records(both), 2, 5) == [ROWS[8], ROWS[0], ROWS[1]]


SPLITS = {
    "harmless-base.train.jsonl": "train",
    "harmless-base.test.jsonl.gz": "validation",
    "train_prefs": "train",
    "test_prefs.jsonl": "validation",
    "validation_1.jsonl": "validation",
    "VALID-00000-of-00001.parquet": "validation",
    "test_eval.jsonl": "validation",
    "train.jsonl": "train",
    "latest.jsonl": None,
    "trainer_testing.jsonl": None,
    "batch3.json": None,
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_a_word_of_a_name(name):
    assert split_name(name) == SPLITS[name]


def test_a_file_of_each_split_is_known_by_a_word_of_its_name(tmp_path):
    for name in ("base.train.jsonl", "base.test.jsonl", "train_on_test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"^'train_on_test.jsonl' names two splits, train and test: rename it"):
        open_source(TextSourceConfig(str(tmp_path)))
    (tmp_path / "train_on_test.jsonl").unlink()
    assert [pair.split for pair in open_source(TextSourceConfig(str(tmp_path))).read()] == ["validation", "train"]
    assert len(open_records(f"{tmp_path}:test")) == 1


def test_splits_are_named_by_folders_of_datasets_and_by_files(write, tmp_path):
    saved = write(tmp_path, "dictionary", ROWS)
    assert [pair.split for pair in open_source(TextSourceConfig(saved)).read(9, 13)] == [
        "train",
        "train",
        "validation",
        "validation",
    ]
    assert len(open_records(f"{saved}:test")) == 11
    with pytest.raises(UserError, match=r"saved has no split 'dev': choose one of train, test"):
        open_records(f"{saved}:dev")
    (tmp_path / "files").mkdir()
    for name in ("train.jsonl", "test.jsonl", "valid-00000-of-00001.jsonl", "harmless.jsonl"):
        (tmp_path / "files" / name).write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    files = open_source(TextSourceConfig(str(tmp_path / "files")))
    assert [pair.split for pair in files.read()] == [None, "validation", "train", "validation"]
    assert len(open_records(f"{tmp_path}/files:test")) == 1


def flipped(path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_parquet_file_is_one_line(write, tmp_path):
    location = write(tmp_path, "parquet", ROWS)
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"PAR1", b""):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: cannot be read .*: fetch the file again") as error:
            open_source(TextSourceConfig(location))
        assert "\n" not in str(error.value)


def test_a_damaged_page_names_the_record_from_which_nothing_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, path, row_group_size=4, compression="zstd", write_page_checksum=True)
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    for place in range(start + 2, start + 40):
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: from record 5: cannot be read"):
        list(open_records(str(path)).read())


def test_text_in_arrow_that_is_not_utf8_is_named_with_record_and_field(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"good"] * 2000 + [b"caf\xe9", b"good"]).view(pyarrow.string())
    table = pyarrow.table({"id": range(2002), "prompt": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for location in (tmp_path / "a.parquet", tmp_path / "saved"):
        for start in (0, 1990, 2000):
            message = rf"{location}:2001: the field 'prompt' is not UTF-8 .*: write the texts as UTF-8"
            with pytest.raises(UserError, match=message):
                list(open_records(str(location)).read(start))


def test_a_file_that_is_one_json_list_says_what_makes_lines_of_it(tmp_path):
    for content in (json.dumps(ROWS), json.dumps(ROWS, indent=1)):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json:1: .*: write one JSON object on each line; jq -c '\.\[\]' does"):
            open_source(TextSourceConfig(str(tmp_path / "a.json")))


def test_a_second_file_that_is_not_there_is_named_before_anything_is_read(write, tmp_path):
    config = TextSourceConfig(f"{write(tmp_path, 'jsonl', ROWS)},{tmp_path}/none.jsonl")
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl \(No such file or directory\): give the path"):
        source_digest(config)


def test_a_damaged_hugging_face_dataset_is_one_line(write, tmp_path):
    location = write(tmp_path, "hugging_face", ROWS)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{re.escape(location)}: cannot be read .*: fetch the file again") as error:
        open_source(TextSourceConfig(location))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "location, message",
    [
        ("none.jsonl", r"cannot read none\.jsonl \(No such file or directory\): give the path"),
        ("none.parquet", r"none\.parquet"),
        ("a.csv", r"a\.csv is of an unknown kind: give a \.jsonl"),
        (None, "there is no source: give the path of a file or folder, or posts for the built-in task"),
        ("", "source '' has nothing before or after a comma"),
        ("a.jsonl,", "source 'a.jsonl,' has nothing before or after a comma"),
        ("empty.parquet", r"empty\.parquet holds no record: give a file"),
    ],
)
def test_a_location_that_is_nothing_is_named(write, tmp_path, monkeypatch, location, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("prompt,chosen\n")
    write(tmp_path, "parquet", ROWS)
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table("a.parquet").slice(0, 0), "empty.parquet")
    with pytest.raises(UserError, match=message) as error:
        open_source(TextSourceConfig(location))
    assert "\n" not in str(error.value)


def test_a_hub_name_without_network_is_one_line(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"hub:nobody/nothing: cannot be read .*check the name and the network"
    ) as error:
        open_source(TextSourceConfig("hub:nobody/nothing"))
    assert "\n" not in str(error.value)


def test_a_hub_name_has_a_subset_and_a_split(tmp_path, monkeypatch):
    # `datasets` takes a folder of this name for a repository. So everything but the download is as with the hub.
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for subset in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            path = tmp_path / "someone/pairs" / subset / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"prompt": f"{subset} {split}", "chosen": "a", "rejected": "b"}) + "\n")
    source = open_source(TextSourceConfig("hub:someone/pairs/harmless-base"))
    pairs = list(source.read())
    assert [(pair.prompt, pair.split) for pair in pairs] == [
        ("harmless-base train", "train"),
        ("harmless-base test", "validation"),
    ]
    assert [pair.where for pair in pairs] == [
        f"hub:someone/pairs/harmless-base:{split}:1" for split in ("train", "test")
    ]
    assert not source.files and source_digest(source.config) == source_digest(source.config)
    assert len(open_records("hub:someone/pairs/helpful-base:test")) == 1
