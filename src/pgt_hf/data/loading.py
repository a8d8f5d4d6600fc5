"""Data sets by name, as ``datasets`` finds them, with its errors in words."""

import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetDict
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import get_token

from .tables import in_words

__all__ = ["how_to_get", "load_dataset", "refuse_config"]


def load_dataset(name: str, config: str | None, **options: Any) -> Any:
    """``datasets.load_dataset``, or ``load_from_disk`` for a folder that ``save_to_disk`` wrote.

    Raises:
        PermissionError: The data set is gated and cannot be read with the present token, if any.
        FileNotFoundError: There is no such folder or data set.
        ConnectionError: The Hub could not be reached.
        ValueError: A file is damaged, or the data set has several configurations; the message names them.
    """
    if Path(name, "dataset_dict.json").is_file() or Path(name, "state.json").is_file():
        found = datasets.load_from_disk(name)
        return found if isinstance(found, DatasetDict) else DatasetDict({"train": found})
    try:
        return datasets.load_dataset(name, config, **options)
    except FileNotFoundError as error:
        if isinstance(error, DatasetNotFoundError) and "gated" in str(error):
            reason = "the present token has no access to it" if get_token() else "no token was found"
            raise PermissionError(how_to_get(name, reason)) from error
        raise FileNotFoundError(
            f"{name!r} is neither a local file or folder nor a data set on the Hub that can be read: {in_words(error)}"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"{name!r} is neither a local folder nor in the cache, and the Hub could not be reached: {error}"
        ) from error
    except (DatasetsError, EOFError, ValueError, tarfile.TarError) as error:
        if "onfig name is missing" in str(error):
            choices = datasets.get_dataset_config_names(name)
            raise ValueError(f"dataset_config must be one of {choices} for {name!r}, got None") from error
        for file in sorted(Path(name).rglob("*.parquet")):
            try:
                pq.read_metadata(file)
            except (OSError, pa.ArrowException) as damage:
                raise ValueError(f"{str(file)!r} cannot be read: {damage}") from error
        raise ValueError(f"{name!r} cannot be read: {in_words(error)}") from error


def refuse_config(config: str | None, name: str) -> None:
    """Raises ValueError for a configuration of a data set that is not from the Hub."""
    if config is not None:
        raise ValueError(f"dataset_config is for data sets from the Hub, got {config!r} for {name!r}")


def how_to_get(name: str, reason: str) -> str:
    """What to do about a gated data set."""
    return (
        f"{name!r} is a gated data set, and {reason}. To get it:\n"
        f"  1. log in and accept its terms at https://huggingface.co/datasets/{name}\n"
        "  2. make a token with read access at https://huggingface.co/settings/tokens\n"
        "  3. run `hf auth login`, or set HF_TOKEN to the token\n"
        "Or use other data: a local folder or file, another Hub id, or for images the embedded --dataset-name digits."
    )
