"""The answers of a benchmark so far, one line each in a file: a second start after a kill goes on from them."""

import hashlib
import json
from pathlib import Path
from typing import Any


class Responses:
    """Answers by request. Only those given under the same identity are taken up again; a torn last line is dropped."""

    def __init__(self, path: Path, *, identity: Any) -> None:
        self._known: dict[str, Any] = {}
        header = {"identity": hash_json(identity)}
        lines = (
            path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        )  # what follows the last line break is torn
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines and json.loads(lines[0]) == header:
            self._known = dict(json.loads(line) for line in lines[1:])
            path.write_bytes(b"".join(line + b"\n" for line in lines))
            self._out = path.open("a")
        else:
            self._out = path.open("w")
            self._out.write(json.dumps(header) + "\n")
        self.taken_up = len(self._known)

    def get(self, kind: str, request: Any) -> Any:
        """Return the answer to a request, or None."""
        return self._known.get(hash_json([kind, request]))

    def add(self, kind: str, request: Any, answer: Any) -> None:
        """Keep an answer."""
        key = hash_json([kind, request])
        self._known[key] = answer
        self._out.write(json.dumps([key, answer]) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def hash_json(value: Any) -> str:
    """Return 64 hex digits of SHA-256 over a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
