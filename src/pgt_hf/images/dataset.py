"""torch data sets of images; each sample depends on (seed, epoch, place) alone, not on a worker's state.

``ImageDataset`` is map-style, ``ImageStream`` reads a source that cannot be indexed. Both give ``pixel_values`` and
``labels``, both decode in the worker that reads, and both come out the same when a run is killed and resumed.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..data.workers import release_remote_files
from ..functional import IGNORED
from ..limits import Count, Seed, Whole, checked
from .decoding import BadImageError, read_upright
from .rules import OnBadImage
from .seeding import preserve_rng, seed_sample
from .transforms import ImageTransform

if TYPE_CHECKING:  # an ImageTrainer of other data sets needs no `datasets`
    import datasets

logger = logging.getLogger(__name__)

_MOST_WORKERS = 256
_ROWS_AT_ONCE = 64


class _Epochs:
    """The epoch, in shared memory: it reaches workers that are running already, forked or spawned."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation, and a stream's order, is drawn."""
        return int(self._epoch)

    @checked
    def set_epoch(self, epoch: Annotated[int, Whole("[0, inf)")]) -> None:
        """Counts from the next batch on, in running workers too; in a stream from the next iteration on."""
        self._epoch.fill_(epoch)


class ImageDataset(_Epochs, Dataset[dict[str, Any]]):
    """The images of a ``datasets.Dataset`` as tensors, for any ``DataLoader``.

    A sample is a function of (seed, epoch, index) alone: the same bits for any number of workers or processes.

    Args:
        split: With the columns ``image`` (Image) and ``label``, as ``load_image_dataset`` gives it; or an
            ``IndexedStream`` of such.
        transform: An ``ImageTransform``, or another function of an image or its file (bytes; of PPM a memoryview).
        seed: For the augmentation.
        on_bad_image: "error" raises, naming the index. "skip" gives a black image with the label -100, which the loss
            and the metrics leave out, warns with the index and the path, and counts it in ``bad_images``.

    Example:
        >>> digits = load_image_dataset("digits")["train"]
        >>> train = ImageDataset(digits, ImageTransform({"input_size": (3, 32, 32)}, training=True))
        >>> train.set_epoch(1)  # other crops than in epoch 0
        >>> train[0]["pixel_values"].shape
        torch.Size([3, 32, 32])
    """

    @checked
    def __init__(
        self,
        split: "datasets.Dataset",
        transform: Callable[[Any], Tensor],
        *,
        seed: Seed = 0,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        super().__init__()
        self.split = undecoded(_image_and_label(split))
        self.reader = _Reader(transform, seed, on_bad_image)
        self._bad_in_epoch = torch.full((len(split),), -1, dtype=torch.int32).share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        indices = [range(len(self))[index] for index in indices]  # -1 is the last; IndexError past the end
        epoch = self.epoch
        with preserve_rng():
            return [
                self.reader(
                    *_cells(self.split[index]), epoch, index, f"image {index}", partial(self._count, index, epoch)
                )
                for index in indices
            ]

    @property
    def bad_images(self) -> int:
        """How many images of the present epoch could not be read so far, in this process and its workers."""
        return int(self.bad_rows().sum())

    def bad_rows(self) -> Tensor:
        """Which they are: a bool for each row."""
        return self._bad_in_epoch == self.epoch

    def _count(self, index: int, epoch: int) -> bool:
        known = bool(self._bad_in_epoch[index] == epoch)
        self._bad_in_epoch[index] = epoch
        return not known


class ImageStream(_Epochs, IterableDataset[dict[str, Any]]):
    """The images of a ``datasets.IterableDataset`` as tensors, the same number of batches on every rank.

    The readers are the ``DataLoader``'s workers on all ranks. At every epoch the source's shards are shuffled by
    (seed, epoch) and dealt to the readers; shards left over are shared, each reader taking every n-th example. Within
    a reader, consecutive blocks of ``block_size`` examples are shuffled. So a sample is a function of (seed, epoch,
    its place in its reader), and of how many readers there are; resuming with the same number gives the same bits. A
    reader that runs out before its share of ``num_samples`` is done starts over in its own part.

    It already splits the data between ranks: in place of ``Accelerator.prepare``, which would split it again, use
    ``prepare_data_loader(loader, num_processes=1, process_index=0, ...)``.

    Args:
        split: With the columns ``image`` and ``label``, as ``load_image_dataset(..., streaming=True)`` gives it.
        transform: An ``ImageTransform``.
        batch_size: The ``DataLoader``'s: workers take turns by batches.
        num_samples: Images in an epoch, over all ranks; each rank gets its part of it, in whole batches.
        rank: This process's number.
        world_size: The number of processes.
        seed: For shards, blocks and augmentation.
        block_size: Examples (undecoded) that a reader holds in memory, and shuffles, at a time.
        on_bad_image: As for ``ImageDataset``.

    Example:
        >>> source = load_image_dataset("digits")["train"].to_iterable_dataset(num_shards=4)
        >>> transform = ImageTransform({"input_size": (3, 32, 32)}, training=True)
        >>> stream = ImageStream(source, transform, batch_size=32, num_samples=1437)
        >>> len(stream) // 32
        44
    """

    @checked
    def __init__(
        self,
        split: "datasets.IterableDataset",
        transform: ImageTransform,
        *,
        batch_size: Count,
        num_samples: Count,
        rank: Annotated[int, Whole("[0, inf)")] = 0,
        world_size: Count = 1,
        seed: Seed = 0,
        block_size: Count = 1000,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        super().__init__()
        if rank >= world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1} (world_size - 1), got {rank}")
        self.batches = num_samples // world_size // batch_size
        if self.batches < 1:
            raise ValueError(
                f"num_samples must be at least world_size * batch_size = {world_size * batch_size}, got {num_samples}"
            )
        self.split = undecoded(_image_and_label(split))
        self.reader = _Reader(transform, seed, on_bad_image)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.block_size = seed, block_size
        self._passed = torch.tensor([-1, 0]).share_memory_()  # the (epoch, batches) to pass over
        self._bad = torch.zeros(_MOST_WORKERS, 2, dtype=torch.int64).share_memory_()  # of each worker: epoch, count

    def __len__(self) -> int:
        """Samples per rank and epoch."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if workers > _MOST_WORKERS:
            raise ValueError(f"num_workers must be at most {_MOST_WORKERS}, got {workers}")
        release_remote_files()
        epoch = self.epoch
        passed = int(self._passed[1]) if self._passed[0] == epoch else 0
        share = range(worker, self.batches, workers)  # DataLoader takes a batch from each worker in turn
        done = len(share[: len(range(worker, min(passed, self.batches), workers))])
        return self._iterate(epoch, worker, workers, done * self.batch_size, len(share) * self.batch_size)

    def fast_forward(self, epoch: int, batches: int) -> None:
        """Makes the first ``batches`` of this rank in ``epoch`` black placeholders, which nothing reads or decodes.

        For ``accelerate.skip_first_batches``, which drops them. All later samples are those of an uninterrupted epoch.
        """
        if not 0 <= batches <= self.batches:
            raise ValueError(f"batches must be from 0 to {self.batches}, got {batches}")
        self._passed.copy_(torch.tensor([epoch, batches]))

    @property
    def bad_images(self) -> int:
        """How many images of the present epoch could not be read so far, in this process and its workers."""
        return int(self._bad[self._bad[:, 0] == self.epoch, 1].sum())

    def _iterate(self, epoch: int, worker: int, workers: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        placeholder = self.reader.placeholder()
        for _ in range(start):
            yield placeholder
        self._bad[worker] = torch.tensor([epoch, 0])
        bad: set[str] = set()

        def count(where: str) -> bool:
            """Counts a bad image once, though a reader that starts over meets it again."""
            known = where in bad
            bad.add(where)
            self._bad[worker, 1] = len(bad)
            return not known

        reader, readers = self.rank * workers + worker, self.world_size * workers
        rows = self._rows(epoch, reader, readers, skip=start - start % self.block_size)
        block: list[tuple[str, dict[str, Any]]] = []
        for place in range(start, stop):
            number, within = divmod(place, self.block_size)
            if not block or within == 0:
                size = min(self.block_size, stop - number * self.block_size)  # the last block may be a short one
                block = list(islice(rows, size))
                order = np.random.default_rng([self.seed, epoch, reader, number]).permutation(size)
            where, row = block[order[within]]
            index = place * readers + reader  # no two samples of an epoch share it
            # A worker's random numbers are used by nobody else.
            with nullcontext() if get_worker_info() else preserve_rng():
                sample = self.reader(row["image"], row["label"], epoch, index, where, partial(count, where))
            yield sample

    def _rows(self, epoch: int, reader: int, readers: int, skip: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The reader's examples without end, from the ``skip``-th on, each with its place in the source."""
        parts = self._parts(epoch, reader, readers)
        shards = self.split.num_shards
        while True:
            found = 0
            for shard, offset, step in parts:
                base = 0
                for table in self.split.shard(shards, shard).iter(batch_size=_ROWS_AT_ONCE):
                    mine = range((offset - base) % step, len(table), step)
                    found += len(mine)
                    for index in mine[skip:]:
                        yield f"image {base + index} of shard {shard}", table.slice(index, 1).to_pylist()[0]
                    skip = max(skip - len(mine), 0)
                    base += len(table)
            if not found:
                raise ValueError(
                    f"reader {reader} of {readers} (processes x workers) has no image at all: the source's {shards} "
                    "shards are too few or too small; use fewer workers"
                )

    def _parts(self, epoch: int, reader: int, readers: int) -> list[tuple[int, int, int]]:
        """What a reader reads, as (shard, first example, every how many)."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(self.split.num_shards).tolist()
        whole = len(shards) - len(shards) % readers
        parts = [(shard, 0, 1) for shard in shards[reader:whole:readers]]
        if left_over := shards[whole:]:
            sharing = range(reader % len(left_over), readers, len(left_over))
            parts.append((left_over[reader % len(left_over)], sharing.index(reader), len(sharing)))
        return parts


def read_image(image: Any) -> bytes | memoryview | Image.Image:
    """The file behind an undecoded cell of an image column (a dict of ``bytes`` and ``path``); else the cell itself.

    Raises:
        BadImageError: The cell is empty, or the file that it names cannot be read.
        OSError: A file elsewhere, which is there, cannot be read now.

    Example:
        >>> read_image({"bytes": b"...", "path": None})
        b'...'
    """
    file = image if isinstance(image, dict) else {"bytes": image, "path": None}
    if file["bytes"] is not None:
        return file["bytes"]
    if not file["path"]:
        raise BadImageError("there is no image, the cell is empty")
    path, elsewhere = file["path"], "://" in file["path"]
    try:
        if elsewhere:
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb") as opened:
                return opened.read()
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise BadImageError("the file cannot be read: it is a device or a pipe")  # which may never end
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        if isinstance(error, BadImageError) or (elsewhere and not isinstance(error, FileNotFoundError)):
            raise  # the network says nothing about the image
        raise BadImageError(f"the file cannot be read: {getattr(error, 'strerror', None) or error}") from error


def thumbnail(split: Any, index: int, side: int) -> Image.Image | None:
    """A small upright copy of an image of a split; None where there is none, or it cannot be read."""
    if "image" not in (split.column_names or ()):
        return None
    try:
        image = read_upright(read_image(undecoded(split)[int(index)].column("image")[0].as_py()), side)
    except (BadImageError, OSError):
        return None
    image.thumbnail((side, side))
    return image


def undecoded(split: Any) -> Any:
    """The rows of a split as Arrow tables, whose images are files."""
    from datasets import Image as ImageFeature

    return split.cast_column("image", ImageFeature(decode=False)).with_format("arrow")


class _Reader:
    """One example from its row, or a placeholder if the image is bad."""

    def __init__(self, transform: Any, seed: int, on_bad_image: str) -> None:
        self.transform, self.seed, self.on_bad_image = transform, seed, on_bad_image

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"max_pixels": Image.MAX_IMAGE_PIXELS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker that is not forked from the program, which may have set another limit."""
        Image.MAX_IMAGE_PIXELS = state.pop("max_pixels")
        self.__dict__.update(state)

    def __call__(
        self, image: Any, label: int, epoch: int, index: int, where: str, count: Callable[[], bool]
    ) -> dict[str, Any]:
        """Seeds the random numbers and leaves them so. ``count`` says whether a bad image is a new one."""
        if not isinstance(label, int) or (label < 0 and label != IGNORED):
            raise ValueError(f"{where} must have the number of a class as its label, got {label!r}")
        seed_sample(self.seed, epoch, index)
        try:
            pixels = self.transform(read_image(image))
        except BadImageError as error:
            path = image["path"] if isinstance(image, dict) else getattr(image, "filename", None)
            place = f"{where} ({path})" if path else where
            if self.on_bad_image == "error":
                raise BadImageError(f"{place}: {error}") from error
            if count():
                logger.warning("%s is skipped: %s", place, error)
            return self.placeholder()
        return _example(pixels, label)

    def placeholder(self) -> dict[str, Any]:
        """A black image as the transform gives them, which the loss and the metrics leave out."""
        if hasattr(self.transform, "blank"):
            return _example(self.transform.blank(), IGNORED)
        return _example(torch.zeros_like(self.transform(Image.new("RGB", (64, 64)))), IGNORED)


def _cells(row: Any) -> tuple[Any, int]:
    """Image and label from an Arrow table of one row. The pixels of a PPM file stay where they are, on the disk."""
    image, label = row.column("image"), row.column("label")[0].as_py()
    if image.null_count or (file := image[0]["bytes"].as_buffer()) is None or file[:2] != b"P6":
        return image[0].as_py(), label
    return {"bytes": memoryview(file), "path": image[0]["path"].as_py()}, label


def _example(pixels: Tensor | dict[str, Tensor], label: int) -> dict[str, Any]:
    return (pixels if isinstance(pixels, dict) else {"pixel_values": pixels}) | {"labels": label}


def _image_and_label(split: Any) -> Any:
    """The split; raises TypeError or ValueError unless it has these columns."""
    if not hasattr(split, "cast_column"):
        raise TypeError(f"split must be a data set of `datasets`, got a {type(split).__name__}")
    missing = {"image", "label"} - set(split.column_names or ())
    if missing:
        raise ValueError(f"split must have the columns 'image' and 'label', got {split.column_names}")
    return split
