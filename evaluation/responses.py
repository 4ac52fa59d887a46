"""The answers of a benchmark so far, one line each in a file: a second start after a kill goes on from them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from training.job import write_whole


class Responses:
    """Answers by request. Only those given under the same identity are taken up again; a torn last line is dropped."""

    def __init__(self, path: Path, *, identity: Any) -> None:
        self._known: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._path = path
        header = {"identity": hash_json(identity)}
        lines = (
            path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        )  # what follows the last line break is torn
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines and json.loads(lines[0]) == header:
            self._known = dict(json.loads(line) for line in lines[1:])
            with write_whole(path) as out:
                out.writelines(line.decode() + "\n" for line in lines)
            self._out = path.open("a")
        else:
            self._out = path.open("w")
            self._out.write(json.dumps(header) + "\n")
        self.taken_up = len(self._known)

    def get(self, kind: str, request: Any) -> Any:
        """Return the answer to a request, or None."""
        key = hash_json([kind, request])
        self._asked.add(key)
        return self._known.get(key)

    def add(self, kind: str, request: Any, answer: Any) -> None:
        """Keep an answer."""
        key = hash_json([kind, request])
        self._known[key] = answer
        self._asked.add(key)
        self._out.write(json.dumps([key, answer]) + "\n")
        self._out.flush()

    def drop_unasked(self) -> None:
        """Leave in the file only what was asked for here, as the last thing before closing: it may have begun with another run's answers."""
        kept = [json.dumps([key, answer]) for key, answer in self._known.items() if key in self._asked]
        header = self._path.read_text().partition("\n")[0]
        with write_whole(self._path) as out:
            out.writelines(line + "\n" for line in [header, *kept])

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def hash_json(value: Any) -> str:
    """Return 64 hex digits of SHA-256 over a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
