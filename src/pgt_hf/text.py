"""Text for the recipes: labelled or plain, from the Hub, a file, a folder, or an embedded data set.

Two data sets need no download: ``docstrings`` (which library does this docstring come from?) and ``stdlib`` (the
source of Python's standard library). Both are real text; neither is a known benchmark.
"""

import ast
import importlib.util
import itertools
import logging
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from .extras import missing
from .limits import Count, Seed, Whole, checked

try:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from tokenizers import ByteLevelBPETokenizer, processors

    from .data.loading import load_dataset, refuse_config
    from .data.splits import EVALUATION_SPLITS, draw, find_column, split_of, train_and_validation
    from .data.tables import TABLES, by_split, in_words, read_tables, visible_files
except ModuleNotFoundError as error:
    raise missing(error.name, __name__, extra="text") from error

__all__ = ["DOCSTRINGS", "STDLIB", "load_labelled_text", "load_plain_text", "train_tokenizer"]

DOCSTRINGS = "docstrings"
STDLIB = "stdlib"

logger = logging.getLogger(__name__)

_LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "numpy", "pandas", "sklearn", "torch", "transformers")
_PER_LIBRARY = {"train": 250, "validation": 50}
_FEW = 10  # documents: with fewer, a tenth of them is less than one
_PIECE = 1 << 20  # characters per row: tokenizers read row by row
_TEXT_COLUMNS = ("text", "sentence", "content", "review")
_LABEL_COLUMNS = ("label", "labels", "class", "category")


@checked
def load_labelled_text(
    name: str | os.PathLike[str],
    config: str | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    max_train_samples: Count | None = None,
    max_eval_samples: Count | None = None,
    seed: Seed = 0,
) -> DatasetDict:
    """Loads text with one class each.

    Args:
        name: "docstrings", a CSV, TSV, JSON or Parquet file, a folder of them (named after the splits), or a Hub id.
        config: The configuration of a Hub data set that has several.
        text_column: The column with the text; by default text, sentence, content or review.
        label_column: The column with the classes; by default label, labels, class or category.
        max_train_samples: Keep at most this many, drawn by ``seed``.
        max_eval_samples: The same for validation.
        seed: For every draw. Without a validation or test split, a tenth of each class is held out.

    Returns:
        ``train`` and ``validation`` with the columns ``text`` and ``label`` (ClassLabel). Rows without text are left
        out, with a warning.

    Raises:
        FileNotFoundError, ConnectionError: There is no such data set, or the Hub could not be reached.
        ValueError: A file is damaged, a column is missing, or a row has no label; the message names it.

    Example:
        >>> load_labelled_text("docstrings")["validation"].features["label"].names[3]
        'numpy'
    """
    name = os.fspath(name)
    local = _docstrings(seed) if name == DOCSTRINGS else _local(Path(name))
    splits = _local_or_from_hub(local, name, config)
    for key, split in splits.items():
        where, columns = f"{name!r}, split {key!r}", {}
        unlabelled = key != "train" and "train" in splits  # as test sets are often published
        with suppress(ValueError) if unlabelled else nullcontext():
            columns = {find_column(split.column_names, where, "label", label_column, _LABEL_COLUMNS): "label"}
        splits[key] = _without_blanks(_of_text(split, where, text_column, columns), where)
    splits = train_and_validation(splits, name, seed)
    limits = {"train": max_train_samples, "validation": max_eval_samples}
    return DatasetDict({key: draw(split, limits[key], seed) for key, split in splits.items()})


@checked
def load_plain_text(
    name: str | os.PathLike[str], config: str | None = None, *, text_column: str | None = None, seed: Seed = 0
) -> DatasetDict:
    """Loads documents for language modeling: ``train`` and ``validation``, with the column ``text``.

    ``name`` is "stdlib" (one document per module), a text file or a folder of them (one document per file), or as in
    ``load_labelled_text``, like the other arguments. Without a validation or test split, a tenth of the documents is
    held out, or the last tenth of each document if there are fewer than 10.

    Raises:
        FileNotFoundError, ConnectionError: There is no such data set, or the Hub could not be reached.
        ValueError: A file is damaged, or there is no column of text.

    Example:
        >>> load_plain_text("stdlib")["train"].column_names
        ['text']
    """
    name = os.fspath(name)
    local = _stdlib(seed) if name == STDLIB else _local(Path(name))
    splits = _local_or_from_hub(local, name, config)
    for key, split in splits.items():
        splits[key] = _of_text(split, f"{name!r}, split {key!r}", text_column, {})
    if "train" in splits and not splits.keys() & set(EVALUATION_SPLITS) and splits["train"].num_rows < _FEW:
        logger.warning("%s has no split for evaluation: the last tenth of each document is held out", name)
        halves = [_halves(text) for text in splits["train"]["text"]]
        parts = zip(("train", "validation"), zip(*halves, strict=True), strict=True)
        splits = DatasetDict({key: Dataset.from_dict({"text": list(texts)}) for key, texts in parts})
    both = train_and_validation(splits, name, seed, labelled=False)
    return DatasetDict({key: _in_pieces(split) for key, split in both.items()})


@checked
def train_tokenizer(
    texts: Iterable[str], vocab_size: Annotated[int, Whole("[259, 10000000]")]
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer like GPT-2's, with the special tokens that a classifier needs.

    ``vocab_size`` is the largest number of tokens: at least 259, for 256 bytes and 3 special tokens.

    Example:
        >>> tokenizer = train_tokenizer(["a small text"], vocab_size=300)
        >>> tokenizer.decode(tokenizer("a small text")["input_ids"], skip_special_tokens=True)
        'a small text'
    """
    special = ["<pad>", "<cls>", "<end>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, min_frequency=0, special_tokens=special, show_progress=False)
    tokenizer = bpe._tokenizer
    numbers = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <end>", special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<cls>", eos_token="<end>", sep_token="<end>"
    )


def _local_or_from_hub(local: DatasetDict | None, name: str, config: str | None) -> DatasetDict:
    if local is None:
        return load_dataset(name, config)
    refuse_config(config, name)
    return local


def _local(path: Path) -> DatasetDict | None:
    """Tables, else text files; None for a folder that ``datasets`` wrote, and if there is no such path."""
    if path.is_file():
        kind = path.suffix.lower()
        if kind not in (*TABLES, ".txt"):
            raise ValueError(f"a file of text must be one of {', '.join(TABLES)}, .txt, got {str(path)!r}")
        return _documents({"train": [path]}) if kind == ".txt" else read_tables({"train": [path]})
    if not path.is_dir():
        return None
    files = visible_files(path)
    if any(file.suffix.lower() in (".parquet", ".arrow") for file in files):
        return None
    for kinds in ((".csv", ".tsv"), (".jsonl", ".json")):
        if tables := [file for file in files if file.suffix.lower() in kinds]:
            return read_tables(by_split(tables, path))
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if not texts:
        raise ValueError(f"{str(path)!r} holds no {', '.join(TABLES)} or .txt files")
    folders = {file: split_of(file.relative_to(path).parts[0], alone=True) for file in texts if file.parent != path}
    if len(folders) == len(texts) and any(folders.values()):
        parts: dict[str, list[Path]] = {}
        for file, split in folders.items():
            parts.setdefault(split or "train", []).append(file)
        return _documents(parts)
    return _documents(by_split(texts, path) if any(split_of(file.stem) for file in texts) else {"train": texts})


def _documents(files: dict[str, list[Path]]) -> DatasetDict:
    """One row per file."""
    splits = DatasetDict()
    for split, paths in files.items():
        texts = []
        for path in paths:
            try:
                texts.append(path.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{str(path)!r} cannot be read: {in_words(error)}") from error
            if not texts[-1].strip():
                raise ValueError(f"{str(path)!r} has no text")
        splits[split] = Dataset.from_dict({"text": texts})
    return splits


def _of_text(split: Dataset, where: str, text_column: str | None, columns: dict[str, str]) -> Dataset:
    """The column of text, renamed to ``text``, and others under new names."""
    column = find_column(split.column_names, where, "text", text_column, _TEXT_COLUMNS)
    if column in columns:
        raise ValueError(f"{where}: text_column and label_column must be two columns, got {column!r} for both")
    if getattr(split.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{where}: column {column!r} must hold text, it holds {split.features[column]}")
    return split.select_columns([column, *columns]).rename_columns({column: "text"} | columns)


def _without_blanks(split: Dataset, where: str) -> Dataset:
    texts = split.select_columns("text").with_format("arrow")[:]["text"]
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, ""))), 0).to_numpy()
    if not blank.any():
        return split
    logger.warning("%s: %d rows without text are left out, row %d (from 0) first", where, blank.sum(), blank.argmax())
    return split.select((~blank).nonzero()[0])


def _halves(text: str) -> tuple[str, str]:
    """The first nine tenths and the rest, cut at the end of a line if possible, else of a word."""
    middle = len(text) * 9 // 10
    place = next((end for mark in "\n " if (end := text.rfind(mark, len(text) // 2, middle)) > 0), middle - 1)
    return text[: place + 1], text[place + 1 :]


def _in_pieces(split: Dataset) -> Dataset:
    """Splits documents that are too large for one row, at the ends of lines."""
    lengths = pc.utf8_length(split.with_format("arrow")[:]["text"])
    if (pc.max(lengths).as_py() or 0) <= _PIECE:
        return split
    rows: list[str] = []
    for text in split["text"]:
        start = 0
        while start < len(text):
            end = start + _PIECE
            end = len(text) if end >= len(text) else (text.rfind("\n", start, end) + 1 or end)
            rows.append(text[start:end])
            start = end
    return Dataset.from_dict({"text": rows})


def _docstrings(seed: int) -> DatasetDict:
    """Docstrings by library, without the library's name; training and validation come from different files."""
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in _PER_LIBRARY}
    for label, library in enumerate(_LIBRARIES):
        files = _sources(_root(library), seed)
        held_out = len(files) // 5
        parts = {"validation": files[:held_out], "train": files[held_out:]}
        for split, part in parts.items():
            found = itertools.chain.from_iterable(map(_docstrings_of, part))
            texts = dict.fromkeys(itertools.islice(found, _PER_LIBRARY[split]))
            rows[split] += [{"text": text.replace(library, "..."), "label": label} for text in texts]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(_LIBRARIES))})
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in rows.items()})


def _docstrings_of(path: Path) -> Iterator[str]:
    """First paragraphs of the docstrings of functions and classes."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and test files of parsers
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text) >= 40:
                yield text


def _stdlib(seed: int) -> DatasetDict:
    files = _sources(Path(sysconfig.get_paths()["stdlib"]), seed)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return DatasetDict(train=Dataset.from_dict({"text": texts}))


def _root(library: str) -> Path:
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the set {DOCSTRINGS!r} reads the source of {library}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def _sources(root: Path, seed: int) -> list[Path]:
    """The modules below ``root`` in an order drawn by ``seed``, without tests and installed packages."""
    left_out = {"test", "tests", "site-packages", "dist-packages"}
    found = sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    random.Random(int(seed)).shuffle(found)
    return found
