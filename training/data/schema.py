"""The one row schema behind every source: a prompt, K responses, and where they came from.

A rows file (`rows.parquet`, `responses.parquet`) has exactly the columns of `SCHEMA`, ordered by nothing in particular.
"""

import hashlib
import json

import pyarrow as pa

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),  # hex, 32 digits, of prompt and responses; unique
        pa.field("split", pa.string(), nullable=False),  # train | heldout
        pa.field("prompt", pa.list_(MESSAGE), nullable=False),  # conversation up to and including the last user turn
        pa.field("responses", pa.list_(pa.string()), nullable=False),  # K texts, the assistant's next turn
        pa.field("preferred", pa.int32()),  # index of the preferred response; null where nobody said
        pa.field("truncated", pa.list_(pa.bool_())),  # sampled responses cut by the answer cap; null for given ones
        # log q of each response under the policy that sampled it: nats, over its trained tokens; null where none is needed
        pa.field("logq", pa.list_(pa.float64())),
        # the tokens of each response that was sampled here, as they were drawn, with its stop token; null for text from outside
        pa.field("response_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("source", pa.string(), nullable=False),  # file, or policy digest, the row came from
        pa.field("line", pa.int64(), nullable=False),  # 1-based line in the source
    ]
)


def digest_row(prompt: list[dict[str, str]], responses: list[str], *, repeats: int = 0) -> str:
    """Return the row id: 32 hex digits of SHA-256 over prompt and responses, independent of source and split.

    `repeats` counts the equal rows before this one: what was sampled twice is two rows.
    """
    content = [[(m["role"], m["content"]) for m in prompt], responses, *([repeats] if repeats else [])]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_prompt(prompt: list[dict[str, str]]) -> str:
    """Return 64 hex digits of SHA-256 over the prompt; equal prompts share a split through it."""
    text = json.dumps([(m["role"], m["content"]) for m in prompt], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
