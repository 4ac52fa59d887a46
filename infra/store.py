"""The object store: S3 as every S3 server speaks it, through boto3, which only this module knows.

Names are relative to the store's prefix. Writes that others may race for are conditional (`If-None-Match`, `If-Match`); a
probe at start refuses a server that ignores the condition, since everything else here relies on it.
"""

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import CancelledError

from infra.fingerprint import digest_file, visible_files
from infra.settings import Settings

MULTIPART_BYTES = 64 << 20
CONFLICT_ATTEMPTS = 20
PARALLEL_FILES = 4
CHECK_CHUNK_BYTES = 4 << 20


class StoreError(Exception):
    """The store refused or failed; the message says what, where, got, expected, next."""


class PreconditionFailed(StoreError):  # noqa: N818 - S3's own name
    """A conditional write met another state than the one named."""


class FileChanged(StoreError):  # noqa: N818 - what happened
    """A stored file has other bytes than were recorded of it."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the store lists it; `modified` is by the store's clock, in unix seconds."""

    name: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact: its name below the artifact's prefix, bytes, and 64 hex digits of SHA-256."""

    name: str
    size: int
    sha256: str


class Store:
    """One bucket and prefix of an S3 server."""

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str = "",
        endpoint: str | None = None,
        region: str = "us-east-1",
        access_key: str | None = None,
        secret_key: str | None = None,
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.endpoint = endpoint or "AWS S3"
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=region,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=Config(
                signature_version="s3v4",
                connect_timeout=10,
                read_timeout=120,
                max_pool_connections=4 * PARALLEL_FILES,
                retries={"mode": "standard", "max_attempts": 5},
                s3={"addressing_style": "path" if endpoint else "auto"},
            ),
        )
        self._transfer = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES)
        self._sending: dict[int, tuple[str, Any]] = {}  # uploads under way: where to, and what can be cancelled
        self._stopped: list[str] = []  # below which keys nothing is uploaded any more

    def url(self, name: str) -> str:
        """Return `s3://bucket/prefix/name`."""
        return f"s3://{self.bucket}/{self._key(name)}"

    def name_of(self, url: str) -> str:
        """Return the name of an `s3://` URL in this store. Raises ValueError for one outside."""
        root = self.url("").rstrip("/") + "/"
        if not url.startswith(root):
            raise ValueError(f"{url}: outside this store; expected a URL that starts with {root}")
        return url.removeprefix(root).strip("/")

    def get(self, name: str, *, start: int | None = None, length: int | None = None) -> tuple[bytes, str] | None:
        """Return (bytes, etag) of an object, or of `length` bytes of it from `start`; None where there is none."""
        extra = {}
        if start is not None:
            extra["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        try:
            answer = self._call("get_object", name, **extra)
        except FileNotFoundError:
            return None
        return answer["Body"].read(), answer["ETag"]

    def put(self, name: str, data: bytes, *, create: bool = False, replace: str | None = None) -> str:
        """Write an object whole and return its etag.

        `create`: only where there is none. `replace`: only over the object with this etag. Raises PreconditionFailed
        otherwise. A lost answer may hide a write that happened: after PreconditionFailed, read back and compare.
        """
        extra: dict[str, str] = {}
        if create:
            extra["IfNoneMatch"] = "*"
        if replace is not None:
            extra["IfMatch"] = replace
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                return str(self._call("put_object", name, Body=data, ChecksumAlgorithm="SHA256", **extra)["ETag"])
            except _Conflict:
                time.sleep(min(0.05 * 2**attempt, 2.0))
        raise StoreError(
            f"put {self.url(name)}: {CONFLICT_ATTEMPTS} times in conflict with other writers; try again later"
        )

    def stat(self, name: str) -> ObjectInfo | None:
        """Return an object's size, etag and time, None where there is none."""
        try:
            answer = self._call("head_object", name)
        except FileNotFoundError:
            return None
        return ObjectInfo(name, answer["ContentLength"], answer["ETag"], answer["LastModified"].timestamp())

    def scan(self, below: str) -> Iterator[ObjectInfo]:
        """Yield every object below a name, in the order of names."""
        token: dict[str, str] = {}
        root = self._key("").rstrip("/")
        while True:
            answer = self._call("list_objects_v2", None, Prefix=self._key(below).rstrip("/") + "/", **token)
            for item in answer.get("Contents", []):
                name = item["Key"].removeprefix(root).lstrip("/")
                yield ObjectInfo(name, item["Size"], item["ETag"], item["LastModified"].timestamp())
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def upload_folder(self, folder: Path, name: str) -> list[StoredFile]:
        """Write every file of a folder below `name`, several at once, and return the manifest."""
        files = sorted(visible_files(folder))
        hasher = ThreadPoolExecutor(1)  # hashing and sending run side by side: both let go of the interpreter lock
        try:
            with create_transfer_manager(self._client, self._transfer) as transfers:
                digests = [hasher.submit(digest_file, folder / file) for file in files]
                sending = {file: self._send(transfers, folder / file, f"{name}/{file}") for file in files}
                for file, sent in sending.items():
                    self._guard(f"upload {folder / file} to {self.url(f'{name}/{file}')}", sent.result)
                    del self._sending[id(sent)]
                return [
                    StoredFile(file, (folder / file).stat().st_size, digest.result())
                    for file, digest in zip(files, digests, strict=True)
                ]
        finally:
            hasher.shutdown(cancel_futures=True)

    def stop_uploads(self, below: str = "") -> None:
        """End for good, within seconds, what other threads upload below a name: their `upload_folder` raises StoreError."""
        self._stopped.append(self._key(below))
        for key, sent in list(self._sending.values()):
            if self._is_stopped(key):
                sent.cancel()

    def _is_stopped(self, key: str) -> bool:
        return any(key.startswith(below) for below in self._stopped)

    def _send(self, transfers: Any, path: Path, name: str) -> Any:
        extra = {"ChecksumAlgorithm": "SHA256"} | _content_type(path)
        key = self._key(name)
        sent = transfers.upload(str(path), self.bucket, key, extra)
        self._sending[id(sent)] = (key, sent)
        if self._is_stopped(key):  # asked for while this one was on its way into the list
            sent.cancel()
        return sent

    def download_folder(self, name: str, files: list[StoredFile], folder: Path) -> None:
        """Fetch the files of a manifest into `folder`, which appears whole or not at all, each checked by its digest."""
        partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")

        def download(file: StoredFile) -> None:
            path, source = partial / file.name, f"{name}/{file.name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._guard(
                f"download {self.url(source)} to {path}",
                lambda: self._client.download_file(self.bucket, self._key(source), str(path), Config=self._transfer),
            )
            self._compare(source, digest_file(path), file)

        try:
            with ThreadPoolExecutor(PARALLEL_FILES) as pool:
                list(pool.map(download, files))
            partial.mkdir(parents=True, exist_ok=True)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process fetched the same folder first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def missing_files(self, name: str, files: Sequence[StoredFile]) -> list[str]:
        """Return the names of a manifest's files that are not below `name`, or not in their recorded size."""
        sizes = {item.name: item.size for item in self.scan(name)}
        return [file.name for file in files if sizes.get(f"{name}/{file.name}") != file.size]

    def check_files(self, name: str, files: Sequence[StoredFile]) -> None:
        """Read every file of a manifest below `name` and raise StoreError unless its bytes are the recorded ones."""

        def check(file: StoredFile) -> None:
            source, got = f"{name}/{file.name}", hashlib.sha256()
            body = self._call("get_object", source)["Body"]

            def read() -> None:
                for chunk in body.iter_chunks(CHECK_CHUNK_BYTES):
                    got.update(chunk)

            self._guard(f"read {self.url(source)}", read)
            self._compare(source, got.hexdigest(), file)

        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(check, files))

    def _compare(self, source: str, got: str, file: StoredFile) -> None:
        if got != file.sha256:
            raise FileChanged(
                f"{self.url(source)}: got SHA-256 {got}, expected {file.sha256}; the object was changed after it was "
                "recorded: restore it, or delete its record to compute it anew"
            )

    def delete(self, name: str) -> None:
        """Delete an object; nothing happens where there is none."""
        self._call("delete_object", name)

    def ensure_bucket(self) -> None:
        """Make the bucket where there is none. For the local stack's own S3 only: nobody else's gets a bucket unasked."""
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise self._explain(f"look for bucket {self.bucket}", error) from error
            self._guard(f"create bucket {self.bucket}", lambda: self._client.create_bucket(Bucket=self.bucket))
        except BotoCoreError as error:
            raise self._explain(f"look for bucket {self.bucket}", error) from error

    def probe(self) -> None:
        """Check reach, credentials, bucket and conditional writes; raise StoreError naming what is wrong.

        A server that ignores `If-None-Match` would let two attempts overwrite each other's record.
        """
        name = f"probe/{uuid.uuid4().hex}"
        self.put(name, b"first", create=True)
        try:
            self.put(name, b"second", create=True)
        except PreconditionFailed:
            return
        finally:
            self.delete(name)
        raise StoreError(
            f"{self.endpoint}: the store ignores conditional writes: got two writes of {self.url(name)} with "
            "If-None-Match: *, expected the second to be refused with 412; use AWS S3, SeaweedFS, MinIO or Ceph in a "
            "version that supports them"
        )

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self.prefix, name.strip("/")) if part)

    def _call(self, operation: str, name: str | None, **arguments: Any) -> Any:
        where = {"Bucket": self.bucket} | ({} if name is None else {"Key": self._key(name)})
        what = f"{operation} {self.url(name or arguments.get('Prefix', ''))}"
        return self._guard(what, lambda: getattr(self._client, operation)(**where, **arguments))

    def _guard(self, what: str, call: Callable[[], Any]) -> Any:
        """Run a request; turn its failure into one of ours."""
        try:
            return call()
        except CancelledError as error:
            raise StoreError(f"{what}: stopped on request") from error
        except (BotoCoreError, ClientError, boto3.exceptions.Boto3Error) as error:
            raise self._explain(what, error) from error

    def _explain(self, what: str, error: Exception) -> Exception:
        response = getattr(error, "response", None) or getattr(error.__cause__ or error.__context__, "response", None)
        code = (response or {}).get("Error", {}).get("Code", type(error).__name__)
        status = (response or {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchBucket":
            return StoreError(
                f"{what}: the bucket {self.bucket!r} does not exist at {self.endpoint}; create it, or set VARFLOW_S3_BUCKET"
            )
        if code in {"PreconditionFailed", "412"} or status == 412:
            return PreconditionFailed(f"{what}: another state was there")
        if code in {"ConditionalRequestConflict", "OperationAborted", "409"} or status == 409:
            return _Conflict(what)
        if code in {"NoSuchKey", "404", "NotFound"}:
            return FileNotFoundError(f"{what}: no such object at {self.endpoint}")
        if code in {"SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied", "403", "NoCredentialsError"}:
            return StoreError(
                f"{what}: {self.endpoint} refused the credentials ({code}); set VARFLOW_S3_ACCESS_KEY and "
                "VARFLOW_S3_SECRET_KEY to ones that may read and write this bucket"
            )
        if code in {"EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ReadTimeoutError"}:
            return StoreError(
                f"{what}: no answer from {self.endpoint} ({code}); start it (`varflow up`) or set VARFLOW_S3_ENDPOINT"
            )
        return StoreError(f"{what}: {self.endpoint} answered {code}: {str(error)[:300]}")


def open_store(settings: Settings) -> Store:
    """Return the store that the settings name, not probed yet."""
    secret = settings.s3_secret_key
    return Store(
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        access_key=settings.s3_access_key,
        secret_key=secret.get_secret_value() if secret else None,
    )


class _Conflict(StoreError):  # noqa: N818
    """409: another conditional write is under way; try again."""


def _content_type(path: Path) -> dict[str, str]:
    """Return the content type of what a browser shows straight from the store."""
    known = {".html": "text/html; charset=utf-8", ".json": "application/json", ".jsonl": "application/jsonlines"}
    return {"ContentType": known[path.suffix]} if path.suffix in known else {}


def digest_bytes(data: bytes) -> str:
    """Return 64 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()
