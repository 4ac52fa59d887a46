"""What the safetensors files of a model folder hold, read from their headers without torch: 8 bytes of length, JSON, then the bytes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, and of which kind it is."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int  # in bytes

    def equals(self, other: "StoredTensor") -> bool:
        """Tell whether another tensor is the same to the byte."""
        if (self.dtype, self.shape, self.size) != (other.dtype, other.shape, other.size):
            return False
        with self.path.open("rb") as ours, other.path.open("rb") as theirs:
            ours.seek(self.start)
            theirs.seek(other.start)
            wanted = (min(CHUNK_BYTES, self.size - done) for done in range(0, self.size, CHUNK_BYTES))
            return all(ours.read(count) == theirs.read(count) for count in wanted)


def list_weights(folder: Path) -> list[Path]:
    """Return the files that a model is loaded from: other formats beside them, or a second copy under other names, are not."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return a model folder's tensors by name; none where it has no safetensors."""
    found = {}
    for path in list_weights(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            found[name] = StoredTensor(tensor["dtype"], tuple(tensor["shape"]), path, 8 + length + begin, end - begin)
    return found


def count_parameters(folder: Path) -> int:
    """Return how many numbers a model's tensors hold, of whichever dtype they are stored in."""
    return sum(math.prod(tensor.shape) for tensor in read_tensors(folder).values())


def same_weights(one: Path, other: Path) -> bool:
    """Tell whether two model folders hold the same tensors, byte for byte, whatever files they lie in."""
    ours, theirs = read_tensors(one), read_tensors(other)
    return bool(ours) and ours.keys() == theirs.keys() and all(ours[name].equals(theirs[name]) for name in ours)
