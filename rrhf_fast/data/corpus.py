"""Tokenised queries in a memory-mapped Arrow file.

Columns: the tokens, rewards, prompts and places of the queries, and an index of a few numbers for
each, which alone is read into memory. `datasets.Dataset.from_file` opens the file too.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from rrhf_fast.data.forest import forest_tokens
from rrhf_fast.data.split import prompt_key
from rrhf_fast.data.tokenise import TokenisedQuery

# 64-bit offsets: a batch may hold more than 2^31 tokens.
_TOKENS = pa.large_list(pa.int32())
_TEXTS = {
    "prompt_ids": _TOKENS,
    "response_ids": pa.large_list(_TOKENS),
    "rewards": pa.large_list(pa.float32()),
    "prompt": pa.large_string(),  # JSON
    "where": pa.large_string(),
}
_INDEX = {
    "num_responses": pa.int32(),
    "forest_tokens": pa.int32(),  # in a pack of the forest
    "padded_width": pa.int32(),  # of its rows, padded
    "distinct_rewards": pa.int32(),
    "distinct_responses": pa.int32(),
    "end_id": pa.int32(),  # the token that ends its responses
    "prompt_key": pa.uint64(),  # equal for rows with the same question
    "digest": pa.uint64(),  # of tokens and rewards
}
SCHEMA = pa.schema(_TEXTS | _INDEX)


class Corpus(Sequence[TokenisedQuery]):
    """Queries of a file, all of them or some.

    Attributes:
        index: by name, one number per query; see the schema.
    """

    def __init__(self, file: Path):
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as reader:
            self._batches = list(reader)
        self._views = list(map(_Views, self._batches))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        table = pa.Table.from_batches(self._batches, SCHEMA)
        self.index = {name: _array(table[name].combine_chunks()) for name in _INDEX}
        self._rows = np.arange(table.num_rows)

    def pick(self, places: np.ndarray) -> "Corpus":
        """The queries at these places; shares the file."""
        picked = object.__new__(Corpus)
        picked._batches, picked._views = self._batches, self._views
        picked._starts = self._starts
        picked._rows = self._rows[places]
        picked.index = {name: column[places] for name, column in self.index.items()}
        return picked

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> TokenisedQuery:
        batch, row = self._find(place)
        return self._views[batch].query(row)

    def prompt(self, place: int) -> str | list[dict]:
        """The prompt of a query, as in its row."""
        batch, row = self._find(place)
        return json.loads(self._batches[batch].column("prompt")[row].as_py())

    def where(self, place: int) -> str:
        """Where a query's row is: "file:line" or "dataset[index]"."""
        batch, row = self._find(place)
        return self._batches[batch].column("where")[row].as_py()

    @property
    def padded_tokens(self) -> np.ndarray:
        """`padded.padded_tokens` of each query."""
        return self.index["num_responses"].astype(np.int64) * (self.index["padded_width"] - 1)

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end responses."""
        return np.unique(self.index["end_id"]).tolist()

    def digest(self) -> str:
        """A hash of the tokens and rewards of these queries, in order."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.index["digest"]))

    def _find(self, place: int) -> tuple[int, int]:
        """The batch of a query, and its row there."""
        row = int(self._rows[place])
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, row - int(self._starts[batch])


class _Views:
    """The tokens and rewards of a batch, as arrays that share the file's memory."""

    def __init__(self, batch: pa.RecordBatch):
        responses = batch.column("response_ids")
        self._responses = _array(responses.offsets)
        self._prompt_ids = _view(batch.column("prompt_ids"))
        self._response_ids = _view(responses.values)
        self._rewards = _view(batch.column("rewards"))

    def query(self, row: int) -> TokenisedQuery:
        """Copies: arrays that cannot be written make PyTorch warn."""
        numbers = range(self._responses[row], self._responses[row + 1])
        return TokenisedQuery(
            _item(self._prompt_ids, row),
            [_item(self._response_ids, i) for i in numbers],
            _item(self._rewards, row),
        )


def _view(lists: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    return _array(lists.offsets), _array(lists.values)


def _array(numbers: pa.Array) -> np.ndarray:
    """The same memory, by a way that imports no pandas, as pyarrow's own does. Truth values, which
    are bits there, are copied."""
    if numbers.type == pa.bool_():
        return np.from_dlpack(numbers.cast(pa.uint8())).astype(bool)
    return np.from_dlpack(numbers)


def _item(view: tuple[np.ndarray, np.ndarray], row: int) -> np.ndarray:
    offsets, values = view
    return values[offsets[row] : offsets[row + 1]].copy()


def as_batch(queries: Sequence[TokenisedQuery]) -> pa.RecordBatch:
    """Queries with their rows, as the file holds them."""
    responses = [ids for query in queries for ids in query.response_ids]
    k = [len(query.response_ids) for query in queries]
    columns = {
        "prompt_ids": _lists([query.prompt_ids for query in queries], pa.int32()),
        "response_ids": pa.LargeListArray.from_arrays(_offsets(k), _lists(responses, pa.int32())),
        "rewards": _lists([query.rewards for query in queries], pa.float32()),
        "prompt": [json.dumps(query.row.prompt, ensure_ascii=False) for query in queries],
        "where": [query.row.where for query in queries],
        "num_responses": k,
        "forest_tokens": map(forest_tokens, queries),
        "padded_width": [query.padded_width for query in queries],
        "distinct_rewards": [len(set(query.rewards.tolist())) for query in queries],
        "distinct_responses": [
            len({ids.tobytes() for ids in query.response_ids}) for query in queries
        ],
        "end_id": [query.response_ids[0][-1] for query in queries],
        "prompt_key": [prompt_key(query.row) for query in queries],
        "digest": map(_digest, queries),
    }
    arrays = [
        column
        if isinstance(column, pa.Array)
        else pa.array(list(column), type=SCHEMA.field(name).type)
        for name, column in columns.items()
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.LargeListArray:
    offsets = _offsets(len(array) for array in arrays)
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), kind))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int64())


def _digest(query: TokenisedQuery) -> int:
    digest = xxhash.xxh3_64()
    for array in (query.prompt_ids, *query.response_ids, query.rewards):
        digest.update(len(array).to_bytes(8))
        digest.update(np.ascontiguousarray(array))
    return digest.intdigest()
