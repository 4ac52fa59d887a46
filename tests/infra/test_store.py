"""The store and the commit protocol on a real S3 server."""

import http.server
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import ledger, records
from infra.fingerprint import fingerprint
from infra.records import Record
from infra.settings import Settings
from infra.store import PreconditionFailed, Store, StoreError


@pytest.fixture
def store(s3: Settings) -> Store:
    """Return a store under a prefix of its own."""
    assert s3.s3_secret_key
    return Store(
        bucket=s3.s3_bucket,
        prefix=f"test-{uuid.uuid4().hex[:8]}",
        endpoint=s3.s3_endpoint,
        access_key=s3.s3_access_key,
        secret_key=s3.s3_secret_key.get_secret_value(),
    )


def make_record(store: Store, folder: Path, *, config: int = 1) -> Record:
    """Upload a folder as an attempt and return its record, not committed."""
    attempt = uuid.uuid4().hex
    identity = {"step": "trial", "version": 1, "config": {"n": config}, "inputs": {}}
    files = store.upload_folder(folder, f"attempts/{attempt}")
    return Record(
        step="trial", version=1, fingerprint=fingerprint(identity), identity=identity, inputs={}, attempt=attempt,
        prefix=f"attempts/{attempt}", files=tuple(files), summary={}, provenance={}, cost={}, created="", mlflow_run="",
        prefect_run="",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a small file, one in a subfolder, and a hidden one."""
    (tmp_path / "made" / "sub").mkdir(parents=True)
    (tmp_path / "made" / "a.json").write_text("{}")
    (tmp_path / "made" / "sub" / "b.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "made" / ".hidden").write_text("no")
    return tmp_path / "made"


def test_a_folder_comes_back_byte_for_byte(store: Store, folder: Path, tmp_path: Path) -> None:
    files = store.upload_folder(folder, "x/y")
    assert [file.name for file in files] == ["a.json", "sub/b.bin"]
    store.download_folder("x/y", files, tmp_path / "back")
    for file in files:
        assert (tmp_path / "back" / file.name).read_bytes() == (folder / file.name).read_bytes()
    assert [item.name for item in store.scan("x")] == ["x/y/a.json", "x/y/sub/b.bin"]


def test_a_file_of_several_parts_keeps_its_bytes_and_gives_ranges(store: Store, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    block = bytes(range(256)) * 4096  # 1 MiB
    with (tmp_path / "big" / "weights").open("wb") as file:
        for index in range(130):
            file.write(bytes([index]) + block[1:])
    files = store.upload_folder(tmp_path / "big", "big")
    store.download_folder("big", files, tmp_path / "back")
    found = store.get("big/weights", start=129 << 20, length=2)
    assert found and found[0] == bytes([129, 1])


def test_a_changed_object_is_refused_and_no_folder_appears(store: Store, folder: Path, tmp_path: Path) -> None:
    files = store.upload_folder(folder, "x")
    store.put("x/a.json", b"[]")
    with pytest.raises(StoreError, match=r"got SHA-256 .* expected"):
        store.download_folder("x", files, tmp_path / "back")
    assert not list(tmp_path.glob("back*")), "nor anything of it"


def test_conditional_writes(store: Store) -> None:
    etag = store.put("key", b"one", create=True)
    with pytest.raises(PreconditionFailed):
        store.put("key", b"two", create=True)
    second = store.put("key", b"two", replace=etag)
    with pytest.raises(PreconditionFailed):
        store.put("key", b"three", replace=etag)
    assert store.get("key") == (b"two", second)


def test_of_many_writers_of_one_new_key_one_wins(store: Store) -> None:
    def write(index: int) -> bool:
        try:
            store.put("contended", str(index).encode(), create=True)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    found = store.get("contended")
    assert won.count(True) == 1 and found and found[0] == str(won.index(True)).encode()


def test_racing_attempts_make_one_record_and_both_learn_whose(store: Store, folder: Path) -> None:
    attempts = [make_record(store, folder) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        winners = list(pool.map(lambda record: records.commit(store, record), attempts))
    assert winners[0] == winners[1] and winners[0] in attempts
    assert len(list(store.scan("records"))) == 1


def test_committing_the_same_attempt_again_is_the_same_record(store: Store, folder: Path) -> None:
    record = make_record(store, folder)
    assert records.commit(store, record) == record == records.commit(store, record)


def test_another_identity_under_one_fingerprint_is_an_error_with_the_difference(store: Store, folder: Path) -> None:
    record = records.commit(store, make_record(store, folder))
    forged = record.model_copy(update={"identity": record.identity | {"config": {"n": 2}}, "attempt": "other"})
    store.put(records.record_name("trial", record.fingerprint), records.dump(forged))
    with pytest.raises(ValueError, match=r"config\.n: 2 -> 1"):
        records.commit(store, make_record(store, folder))


def test_a_record_without_all_its_files_is_not_found_and_is_replaced(store: Store, folder: Path) -> None:
    broken = records.commit(store, make_record(store, folder))
    store.delete(f"{broken.prefix}/a.json")
    assert records.find(store, step="trial", fingerprint=broken.fingerprint) is None
    mended = records.commit(store, make_record(store, folder))
    assert mended.attempt != broken.attempt
    assert records.find(store, step="trial", fingerprint=broken.fingerprint) == mended


def test_files_without_a_record_are_no_artifact(store: Store, folder: Path) -> None:
    record = make_record(store, folder)
    assert records.find(store, step="trial", fingerprint=record.fingerprint) is None


def test_a_reference_is_resolved_by_its_start_and_ambiguity_is_refused(store: Store, folder: Path) -> None:
    made = [records.commit(store, make_record(store, folder, config=n)) for n in range(3)]
    assert records.resolve(store, f"trial/{made[0].fingerprint[:12]}") == made[0]
    assert records.resolve(store, made[1].fingerprint[:12]) == made[1]
    for reference in ("trial/ffffffffffff", "trial/", "nothing/00"):
        with pytest.raises(ValueError, match=r"expected one; write step/fingerprint"):
            records.resolve(store, reference)


def test_the_same_batch_pushed_twice_is_one_batch(store: Store, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "copy.jsonl").write_text('{"a": 1}\n')
    digest, new = ledger.receive(store, tmp_path / "one.jsonl")
    assert (digest, new) == (ledger.receive(store, tmp_path / "copy.jsonl")[0], True)
    assert ledger.receive(store, tmp_path / "one.jsonl") == (digest, False)
    assert [entry["digest"] for entry in ledger.entries(store)] == [digest]
    assert ledger.read_snapshot(store, ledger.write_snapshot(store, [digest]))[0]["origin"] == "one.jsonl"


def test_of_several_claims_on_a_snapshot_one_holds(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        held = list(pool.map(lambda run: ledger.claim(store, snapshot="s", recipe="r", run=run), "abcd"))
    assert held.count(True) == 1
    winner = "abcd"[held.index(True)]
    assert ledger.claim(store, snapshot="s", recipe="r", run=winner), "the holder asks again and still holds"
    found = ledger.read_claim(store, "s", "r")
    assert found and ledger.claim(store, snapshot="s", recipe="r", run="z", over=found[1]), "taken over knowingly"


class CarelessStore(http.server.BaseHTTPRequestHandler):
    """An S3 server that takes every write and ignores conditions, as some old ones do."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_DELETE(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def careless() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CarelessStore)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_store_that_ignores_conditions_is_refused(careless: str) -> None:
    store = Store(bucket="varflow", endpoint=careless, access_key="key", secret_key="secret")
    with pytest.raises(StoreError, match="ignores conditional writes"):
        store.probe()


def test_no_server_no_bucket_and_wrong_credentials_say_what_to_set(s3: Settings) -> None:
    assert s3.s3_secret_key
    good = {
        "endpoint": s3.s3_endpoint,
        "access_key": s3.s3_access_key,
        "secret_key": s3.s3_secret_key.get_secret_value(),
    }
    for wrong, words in [
        ({"endpoint": "http://127.0.0.1:9"}, "no answer from http://127.0.0.1:9.*varflow up"),
        ({"secret_key": "wrong"}, "refused the credentials.*VARFLOW_S3_ACCESS_KEY"),
        ({"bucket": "absent"}, "'absent' does not exist.*VARFLOW_S3_BUCKET"),
    ]:
        with pytest.raises(StoreError, match=words) as refusal:
            Store(**({"bucket": s3.s3_bucket} | good | wrong)).probe()
        assert s3.s3_secret_key.get_secret_value() not in str(refusal.value)
