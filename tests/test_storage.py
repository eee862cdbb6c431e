"""Buckets as folders, on a real S3 server and a GCS emulator, with faults on the network."""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import pytest
from bucket_servers import Fault

from alignment_gap import storage
from alignment_gap.errors import StorageError, UserError
from alignment_gap.folders import (
    AnyPath,
    Outbox,
    at,
    check_settings,
    here,
    is_held,
    locked,
    remove_folder,
    write_json,
    write_last,
)
from alignment_gap.storage import Url, fetched

UPLOAD = {"s3": "PUT", "gs": "POST"}


def upload_method(folder):
    return UPLOAD[str(folder)[:2]]


def test_a_place_is_a_path_or_a_url(tmp_path):
    assert at(str(tmp_path)) == at(tmp_path) == tmp_path
    url = at("s3://bucket/runs//a/")
    assert isinstance(url, Url) and isinstance(url, AnyPath) and str(url) == f"{url}" == "s3://bucket/runs/a"
    assert at(url) is url and str(at(str(url))) == str(url)
    assert (str(url / "b.json"), url.name, str(url.parent), (url / "b.json").suffix) == (
        "s3://bucket/runs/a/b.json",
        "a",
        "s3://bucket/runs",
        ".json",
    )
    assert pickle.loads(pickle.dumps(url)) == url and str(pickle.loads(pickle.dumps(url))) == str(url)
    for wrong in ("az://bucket/a", "s3://", "https://host/a"):
        with pytest.raises(UserError, match="cannot hold files: give a folder, s3://BUCKET/FOLDER or gs://"):
            at(wrong)
    with pytest.raises(UserError, match="s3://bucket/a: a model is read and written on this machine alone: copy it"):
        here("s3://bucket/a", "a model")


def test_objects_read_as_files_and_folders(bucket):
    folder, _ = bucket
    assert not folder.exists() and list(folder.iterdir()) == []
    for name, text in {"a.txt": "a\r\nb", "run/1/x.npz": "1", "run/2/x.npz": "2", "run-2": "no folder"}.items():
        (folder / name).write_bytes(text.encode())
    assert [path.name for path in folder.iterdir()] == ["a.txt", "run", "run-2"]
    assert (folder / "run").is_dir() and not (folder / "run").is_file() and (folder / "run").exists()
    assert (folder / "a.txt").is_file() and not (folder / "a.txt").is_dir() and not (folder / "a").exists()
    assert (folder / "a.txt").read_text() == "a\nb" and (folder / "a.txt").open().read() == b"a\r\nb"
    assert [str(path) for path in folder.glob("run/*/*.npz")] == [f"{folder}/run/{n}/x.npz" for n in (1, 2)]
    assert [path.name for path in folder.glob("*/1")] == ["1"] and list(folder.glob("*.json")) == []
    for read in ((folder / "b").read_bytes, (folder / "b").unlink):
        with pytest.raises(FileNotFoundError) as raised:
            read()
        assert raised.value.strerror == "No such file or directory" and raised.value.filename == f"{folder}/b"
    (folder / "b").unlink(missing_ok=True)
    (folder / "a.txt").unlink()
    remove_folder(folder / "run")
    assert [path.name for path in folder.iterdir()] == ["run-2"]


def test_a_write_can_ask_that_the_object_is_still_what_was_read(bucket):
    folder, _ = bucket
    path = folder / "object"
    first = path.replace_content(b"1", None)
    assert first and path.replace_content(b"2", None) is None and path.read() == (b"1", first)
    second = path.replace_content(b"2", first)
    assert second and path.replace_content(b"3", first) is None and path.read() == (b"2", second)
    path.unlink()
    assert path.replace_content(b"4", second) is None and not path.exists()


def test_two_writers_of_one_object_at_the_same_time(bucket):
    """The store's own precondition decides, not a look before the write."""
    folder, proxy = bucket
    proxy.faults = [Fault("slow", upload_method(folder), "object", times=2, seconds=0.5)]
    won = []
    writers = [
        threading.Thread(target=lambda text=text: won.append((folder / "object").replace_content(text, None)))
        for text in (b"a", b"b")
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sum(generation is not None for generation in won) == 1


def test_what_completes_a_folder_is_written_once(bucket, tmp_path):
    folder, _ = bucket
    for place in (tmp_path, folder):
        write_last(place / "done.json", {"seconds": 1})
        assert json.loads((place / "done.json").read_text()) == {"seconds": 1}
    write_last(tmp_path / "done.json", {"seconds": 2})
    with pytest.raises(UserError, match=f"{folder} was completed by another run meanwhile"):
        write_last(folder / "done.json", {"seconds": 2})


def test_a_cut_upload_leaves_nothing_and_is_tried_again(bucket):
    folder, proxy = bucket
    content = bytes(2**20)
    proxy.faults = [Fault("cut upload", upload_method(folder), "object", times=100)]
    with pytest.raises(StorageError, match=f"{folder}/object: the store does not answer: run the same command") as told:
        (folder / "object").write_bytes(content)
    assert told.value.status == 1 and "\n" not in str(told.value)
    assert not (folder / "object").exists()
    proxy.faults = [Fault("cut upload", upload_method(folder), "object")]
    (folder / "object").write_bytes(content)
    assert (folder / "object").read_bytes() == content and proxy.faults[0].times == 0


def test_a_write_whose_answer_was_lost_is_no_conflict(bucket):
    folder, proxy = bucket
    proxy.faults = [Fault("cut answer", upload_method(folder), "object")]
    generation = (folder / "object").replace_content(b"1", None)
    assert proxy.faults[0].times == 0 and (folder / "object").read() == (b"1", generation)


def test_a_busy_store_is_asked_again_and_then_named(bucket):
    folder, proxy = bucket
    write = upload_method(folder)
    proxy.faults = [Fault("503", write, "object", times=3)]
    (folder / "object").write_bytes(b"1")
    assert (folder / "object").read_bytes() == b"1"
    assert sum(method == write for method, _ in proxy.requests) == 4
    proxy.faults = [Fault("503", "GET", times=100)]
    with pytest.raises(StorageError, match=rf"{folder}/object: the store does not answer: .*All 4 retry attempts"):
        (folder / "object").read_bytes()


def test_a_slow_answer_is_waited_for(bucket):
    folder, proxy = bucket
    proxy.faults = [Fault("slow", upload_method(folder), seconds=1.5), Fault("slow", "GET", seconds=1.5)]
    (folder / "object").write_bytes(b"1")
    assert (folder / "object").read_bytes() == b"1"
    assert [fault.times for fault in proxy.faults] == [0, 0]


STALLED = """
import sys
from alignment_gap import storage
storage._STALLED = 1
print(storage.Url(sys.argv[1]).read_bytes().decode())
"""


def test_a_connection_that_falls_silent_is_given_up_and_tried_again(s3_folder, s3):
    (s3_folder / "object").write_bytes(b"content")
    s3.faults = [Fault("slow", "GET", "object", seconds=100)]
    command = [sys.executable, "-c", STALLED, f"{s3_folder}/object"]
    # The test process has set its own timeouts in these variables.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TENSORSTORE_CURL")}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "content\n", done.stderr
    assert s3.faults[0].times == 0


def test_what_a_user_has_to_mend_is_one_line(s3_folder, monkeypatch):
    with pytest.raises(StorageError, match=r"s3://elsewhere/a: the bucket does not exist: create it") as told:
        Url("s3://elsewhere/a").write_bytes(b"")
    assert told.value.status == 2 and "\n" not in str(told.value) and len(str(told.value)) < 250
    with pytest.raises(StorageError, match="s3://b: the name of the bucket is not valid"):
        Url("s3://b/a").read_bytes()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=f"{s3_folder}/a: no credentials were found: set AWS_ACCESS_KEY_ID"):
        # A bucket is opened once for each region, so another region opens it again.
        monkeypatch.setenv("AWS_REGION", "eu-west-1")
        (s3_folder / "a").write_bytes(b"")


def test_copies_are_kept_by_their_digest(s3_folder, s3):
    (s3_folder / "a").write_bytes(b"content")
    digest = storage._sha256(b"content")
    path = fetched(s3_folder / "a", digest)
    assert path.read_bytes() == b"content"
    s3.requests = []
    assert fetched(s3_folder / "a", digest) == path and s3.requests == []
    path.write_bytes(b"c0ntent")
    assert fetched(s3_folder / "a", digest).read_bytes() == b"content"
    with pytest.raises(UserError, match=f"{s3_folder}/a was changed since its digest was written"):
        fetched(s3_folder / "a", storage._sha256(b"other"))


def test_an_outbox_sends_what_has_changed_and_manifests_last(s3_folder, s3, tmp_path):
    outbox = Outbox(s3_folder)
    for name in ("card.json", "part-0", "sub/part-1"):
        path = outbox.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    s3.requests = []
    outbox.send(last=("card.json",))
    sent = [path.removeprefix(f"/bucket/{s3_folder.key}/") for method, path in s3.requests if method == "PUT"]
    assert sent == ["part-0", "sub/part-1", "card.json"]
    (outbox.folder / "part-0").write_text("longer")
    s3.requests = []
    outbox.send()
    assert len(s3.requests) == 1 and (s3_folder / "part-0").read_text() == "longer"
    (s3_folder / "part-0").write_bytes(b"of the place")
    (s3_folder / "sub" / "part-1").unlink()
    outbox.fetch("part-0", "sub/part-1")
    assert (outbox.folder / "part-0").read_text() == "of the place" and not (outbox.folder / "sub/part-1").exists()
    outbox.empty()
    assert not outbox.folder.exists() and Outbox(tmp_path).folder == tmp_path


def test_settings_are_compared_in_a_bucket_too(bucket):
    folder, _ = bucket
    check_settings(folder / "job.json", {"steps": 1}, remedy="go")
    write_json(folder / "job.json", {"steps": 1})
    with pytest.raises(UserError, match=rf"{folder} was made with other settings \(steps was 1, now 2\): go"):
        check_settings(folder / "job.json", {"steps": 2}, remedy="go")


# Leases.


@pytest.fixture
def quick(monkeypatch):
    """Leases that are renewed often, and that become stale within a test."""
    monkeypatch.setattr(storage, "RENEW_EVERY", 0.2)
    monkeypatch.setattr(storage, "STALE_AFTER", 1.0)
    monkeypatch.setattr(storage, "_LOOK_EVERY", 0.05)


@pytest.fixture
def unwaited(monkeypatch):
    """Fails the test if it waits between two looks at a lease."""
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("the lease was watched"))


def lease_of_another_machine(folder):
    lease = {"owner": "them", "machine": "another", "host": "far", "process": 7, "renewed": time.time()}
    write_json(folder / ".lock", lease)
    return lease


def test_an_empty_name_of_a_machine_is_replaced(tmp_path, monkeypatch):
    """A kill between making the file and writing to it left it empty, so that all such machines had one name."""
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(tmp_path))
    (tmp_path / "machine").write_text("")
    name = storage._machine()
    assert len(name) == 32 and storage._machine() == name
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]


def test_one_run_at_a_time_on_one_machine(bucket):
    folder, _ = bucket
    assert not is_held(folder)
    with locked(folder):
        assert is_held(folder)
        with pytest.raises(UserError, match=f"{folder} is in use by another run: wait for it"), locked(folder):
            pass
    assert not is_held(folder) and not (folder / ".lock").exists()
    with locked(folder):
        pass


def test_a_lease_that_a_dead_process_of_this_machine_left_is_taken_at_once(bucket, unwaited):
    folder, _ = bucket
    write_json(folder / ".lock", {"owner": "dead", "machine": storage._machine(), "renewed": time.time()})
    with locked(folder):
        assert json.loads((folder / ".lock").read_text())["owner"] != "dead"


HOLD = """
import sys
from alignment_gap.folders import at, locked
with locked(at(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_refused_until_its_owner_is_killed(s3_folder, unwaited):
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", HOLD, str(s3_folder)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{s3_folder} is in use by another run"), locked(s3_folder, wait=0):
            pass
        owner.kill()
    assert json.loads((s3_folder / ".lock").read_text())["process"] == owner.pid
    with locked(s3_folder):
        assert json.loads((s3_folder / ".lock").read_text())["process"] == os.getpid()


def test_one_of_two_machines_takes_a_stale_lease_over(bucket, quick):
    folder, _ = bucket
    lease_of_another_machine(folder)
    ended = []

    def take(machine):
        try:
            ended.append(storage._taken(folder / ".lock", {"owner": machine, "machine": machine, "host": machine}, 0.0))
        except UserError as error:
            ended.append(str(error))

    contenders = [threading.Thread(target=take, args=(machine,)) for machine in ("a", "b")]
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.join()
    refused = [line for line in ended if isinstance(line, str)]
    owner = json.loads((folder / ".lock").read_text())["owner"]
    assert len(refused) == 1 and f"is in use by another run ({owner}, process" in refused[0]


def test_a_lease_that_another_machine_renews_is_refused(bucket, monkeypatch):
    """The other machine renews it between two looks."""
    folder, _ = bucket
    lease = lease_of_another_machine(folder)
    monkeypatch.setattr(storage.time, "sleep", lambda _: write_json(folder / ".lock", lease | {"renewed": time.time()}))
    message = rf"^{folder} is in use by another run \(far, process 7\): wait for it, or give another folder$"
    with pytest.raises(UserError, match=message), locked(folder, wait=0):
        pass
    assert json.loads((folder / ".lock").read_text())["owner"] == "them"


def test_a_run_whose_lease_was_taken_over_leaves_it(bucket):
    """The emulator of GCS removes an object of any generation; Google's store checks the generation."""
    folder, proxy = bucket
    with locked(folder):
        lease_of_another_machine(folder)
    if str(folder).startswith("gs:"):
        assert "ifGenerationMatch=" in next(path for method, path in proxy.requests if method == "DELETE")
    else:
        assert json.loads((folder / ".lock").read_text())["owner"] == "them"


def test_a_lease_that_nobody_renews_is_taken_over(bucket, quick, monkeypatch):
    folder, _ = bucket
    lease_of_another_machine(folder)
    sleep, looks = time.sleep, []
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: looks.append(sleep(seconds)))
    with locked(folder):
        assert looks
        assert json.loads((folder / ".lock").read_text())["owner"] != "them"


def test_a_lease_is_renewed_through_a_busy_store(bucket, quick):
    folder, proxy = bucket
    with locked(folder):
        before = json.loads((folder / ".lock").read_text())
        proxy.faults = [Fault("503", upload_method(folder), "lock", times=8)]
        deadline = time.monotonic() + 20
        while json.loads((folder / ".lock").read_text())["renewed"] == before["renewed"] or proxy.faults[0].times:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert json.loads((folder / ".lock").read_text())["owner"] == before["owner"]


def test_a_run_whose_lease_was_taken_over_ends_at_once(s3_folder, quick, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(storage.os, "_exit", lambda status: ended.append(status) or threading.Event().wait(0.5))
    with locked(s3_folder):
        lease_of_another_machine(s3_folder)
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ended[0] == 1
        storage.RENEW_EVERY = 100.0
    line = f"error: {s3_folder} was taken over by another run, because this one was silent for 1 s: this one ends"
    assert line in capfd.readouterr().err
