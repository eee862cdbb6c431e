"""docs/buckets.md has the numbers and names of the code."""

import pathlib
import re

from alignment_gap import storage
from alignment_gap.checkpoints.layout import METADATA
from alignment_gap.data.records.dataset import CARD
from alignment_gap.data.records.log_probs import CARD as REFERENCE
from alignment_gap.data.tasks.prepare import PARTS
from alignment_gap.jobs.folder import DONE

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "buckets.md").read_text(encoding="utf-8")


def test_its_numbers_are_those_of_the_code():
    retries, stalled, text = storage.RETRIES["max_retries"], storage._STALLED, " ".join(TEXT.split())
    assert f"is silent for {stalled} s is tried again {retries} times" in text
    assert f"renews it every {storage.RENEW_EVERY:.0f} s" in text
    assert f"Nobody renews it for {storage.STALE_AFTER:.0f} s" in text
    waits = [min(0.5 * 2**i, 32) for i in range(retries)]
    assert (storage.RETRIES["initial_delay"], storage.RETRIES["max_delay"]) == ("500ms", "32s")
    assert f"{sum(waits) / 60:.0f} minutes in all" in text


def test_what_completes_a_folder():
    table = TEXT[TEXT.index("| what | is complete with |") :]
    assert re.findall(r"^\| .*? \| `(\S+)`", table, flags=re.MULTILINE)[:5] == [DONE, METADATA, CARD, PARTS, REFERENCE]


def test_it_names_every_variable_that_the_code_reads():
    source = pathlib.Path(storage.__file__).read_text()
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', source)) - {"XDG_CACHE_HOME"}
    assert read - {"AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"} <= set(re.findall(r"`(\w+)`", TEXT))
