"""What has been seen, on disk: finds duplicate rows and contradictory preferences in any number of rows in constant memory.

A preference of one response over another is an edge between two texts under one prompt. In a fixed set, which holds a comparison once,
edges that point both ways contradict each other, and no rule could say who was right: every row that holds one of them goes.

Among samples they stay. Rows are draws: likely responses are drawn again and again, and where judgements are noisy the more often the
more likely some disagree, so leaving those rows out would take the likeliest responses from what stands for the policy. And both
judgements together are what Bradley and Terry's model asks for: a share of preferences, not a verdict.
"""

import hashlib
import sqlite3
from pathlib import Path
from types import TracebackType

from training.data.schema import digest_prompt
from training.data.validate import Preference

TABLES = """
create table seen (place integer primary key, content_id text not null, preferred integer, prompt blob not null, at text not null);
create index seen_content on seen (content_id);
create table edges (pair blob not null, forward integer not null, place integer not null);
create table refused (place integer primary key, reason text not null, at text not null);
"""
# Rows that other rows contradict, and then those without a preference that a row with one, which stays, stands for.
FIND = """
create index edges_pair on edges (pair, forward);
insert or ignore into refused
select place, 'contradiction', min(at) from (
    select a.place as place, seen.at as at
    from edges a join edges b on a.pair = b.pair and b.forward = 1 - a.forward join seen on seen.place = b.place
) group by place;
insert or ignore into refused
select plain.place, 'duplicate', min(said.at) from seen plain join seen said on said.content_id = plain.content_id
where plain.preferred is null and said.preferred is not null and said.place not in (select place from refused)
group by plain.place;
"""


class SeenRows:
    """An index of rows in a SQLite file that lives as long as one ingestion."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        # A killed ingestion starts over, so nothing here has to survive; the cache stays small, the rest is on disk.
        self._db.executescript(
            "pragma journal_mode=off; pragma synchronous=off; pragma cache_size=-2000; begin;" + TABLES
        )

    def find_duplicate(self, content_id: str, *, preferred: int | None) -> str | None:
        """Return "source:line" of an earlier row with this content that says the same: prefers the same response, or none too."""
        found = self._db.execute(
            "select at from seen where content_id = ?1 and preferred is ?2 order by place limit 1",
            (content_id, preferred),
        ).fetchone()
        return found[0] if found else None

    def count(self, content_id: str) -> int:
        """Return how many rows with this content were added."""
        return int(self._db.execute("select count(*) from seen where content_id = ?", (content_id,)).fetchone()[0])

    def add(self, place: int, row: Preference, *, content_id: str, at: str) -> None:
        """Remember a row: `place` counts the kept rows from 0, `content_id` is of prompt and responses, `at` is "source:line"."""
        prompt = bytes.fromhex(digest_prompt(row.prompt))[:16]
        self._db.execute("insert into seen values (?, ?, ?, ?, ?)", (place, content_id, row.preferred, prompt, at))
        if row.preferred is None:
            return
        winner = row.responses[row.preferred]
        for loser in row.responses:
            if loser != winner:
                pair = hashlib.sha256(prompt + "\0".join(sorted((winner, loser))).encode()).digest()[:16]
                self._db.execute("insert into edges values (?, ?, ?)", (pair, winner < loser, place))

    def find_refused(self) -> None:
        """Find every row that another row contradicts, or stands for. Call once, after the last `add`."""
        self._db.executescript(FIND)

    def read_refused(self, *, start: int, stop: int) -> dict[int, tuple[str, str]]:
        """Return the rows among places start <= place < stop that another row contradicts or stands for: the reason, and which one."""
        query = "select place, reason, at from refused where place >= ? and place < ?"
        return {place: (reason, at) for place, reason, at in self._db.execute(query, (start, stop))}

    def count_prompts(self) -> int:
        """Return how many different prompts the rows have that are not refused."""
        query = "select count(distinct prompt) from seen where place not in (select place from refused)"
        return int(self._db.execute(query).fetchone()[0])

    def __enter__(self) -> "SeenRows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._path.unlink()
