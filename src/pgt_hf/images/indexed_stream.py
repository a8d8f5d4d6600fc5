"""Rows of a streamed split by their number: an evaluation reads them where they are, and each image counts once."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..data.workers import release_remote_files

__all__ = ["IndexedStream"]


class IndexedStream:
    """What ``ImageDataset`` needs of a ``datasets.Dataset``, from an ``IterableDataset`` that knows its shards' sizes.

    Processes and workers divide it as they divide a ``Dataset``, so results and their order are the same. A whole
    shard is read for a row, and kept until a row of another one is asked for: read in order, and let shards be small.
    After ``reshard()`` those of Parquet are its row groups (on the Hub, 100 images each).

    Args:
        stream: The source.
        shard_rows: How many rows each of its shards has.
        limit: Have no more rows than this, the first ones.

    Example:
        >>> stream = load_dataset("ILSVRC/imagenet-1k", split="validation", streaming=True).reshard()
        >>> IndexedStream(stream, [100] * stream.num_shards)[49_999].column_names
        ['image', 'label']
    """

    def __init__(self, stream: Any, shard_rows: Sequence[int], limit: int | None = None) -> None:
        self.features, self.column_names = stream.features, stream.column_names
        self.info, self.split = stream.info, stream.split
        self._stream, self._shard_rows, self._limit = stream, shard_rows, limit
        *self._starts, rows = accumulate(shard_rows, initial=0)
        self.num_rows = rows if limit is None else min(rows, limit)
        self._shard: tuple[int, Any] = -1, None  # the number of the one that was read last, and its rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Any:
        """The row as an Arrow table."""
        number = bisect_right(self._starts, index) - 1
        if number != self._shard[0]:
            release_remote_files()
            shard = self._stream.shard(len(self._starts), number).with_format("arrow")
            self._shard = number, next(iter(shard.iter(batch_size=self._shard_rows[number])))
        return self._shard[1].slice(index - self._starts[number], 1)

    def cast_column(self, column: str, feature: Any) -> "IndexedStream":
        """As of a ``Dataset``."""
        return IndexedStream(self._stream.cast_column(column, feature), self._shard_rows, self._limit)

    def with_format(self, kind: str) -> "IndexedStream":
        """As of a ``Dataset``, of which only the format "arrow" is there."""
        if kind != "arrow":
            raise ValueError(f"the format of a stream's rows must be 'arrow', got {kind!r}")
        return self
