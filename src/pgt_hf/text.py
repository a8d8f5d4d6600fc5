"""Text for the recipes: labelled or plain, from the Hub, a file, a folder, or what every installation has already.

Two sets need no download, for trying things out: ``docstrings`` (which library does this docstring come from?) and
``stdlib`` (the source of Python's standard library). Both are real text; neither is a known benchmark.
"""

import ast
import importlib.util
import itertools
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedTokenizerFast

from .extras import missing
from .limits import Count, Seed, Whole, checked

try:
    import datasets
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets.exceptions import DatasetNotFoundError
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from .splits import draw, find_column, train_and_validation
except ModuleNotFoundError as error:
    raise missing(error.name, __name__, extra="text") from error

__all__ = ["DOCSTRINGS", "STDLIB", "load_labelled_text", "load_plain_text", "train_tokenizer"]

DOCSTRINGS = "docstrings"
STDLIB = "stdlib"

_LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "numpy", "pandas", "sklearn", "torch", "transformers")
_PER_LIBRARY = {"train": 250, "validation": 50}
_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_TEXT_COLUMNS = ("text", "sentence", "content", "review")
_LABEL_COLUMNS = ("label", "labels", "class", "category")


@checked
def load_labelled_text(
    name: str,
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
        name: "docstrings", a CSV, JSON, Parquet or text file, a folder of such, or a Hub id.
        config: The configuration, where a Hub data set has several.
        text_column: The column with the text; by default text, sentence, content or review.
        label_column: The column with the classes; by default label, labels, class or category.
        max_train_samples: Keep so many, drawn by ``seed``.
        max_eval_samples: The same for validation.
        seed: For every draw. Where there is no validation or test split, a tenth of each class is held out.

    Returns:
        ``train`` and ``validation`` with the columns ``text`` and ``label`` (ClassLabel).

    Raises:
        FileNotFoundError, ValueError: There is no such data, or a column is missing.

    Example:
        >>> load_labelled_text("docstrings")["validation"].features["label"].names[3]
        'numpy'
    """
    splits = _docstrings(seed) if name == DOCSTRINGS else _load(name, config)
    present = next(iter(splits.values())).column_names
    columns = {
        find_column(present, "text", text_column, _TEXT_COLUMNS): "text",
        find_column(present, "label", label_column, _LABEL_COLUMNS): "label",
    }
    splits = splits.select_columns(list(columns)).rename_columns(columns)
    splits = train_and_validation(splits, name, seed)
    limits = {"train": max_train_samples, "validation": max_eval_samples}
    return DatasetDict({key: draw(split, limits[key], seed) for key, split in splits.items()})


@checked
def load_plain_text(
    name: str, config: str | None = None, *, text_column: str | None = None, seed: Seed = 0
) -> DatasetDict:
    """Loads documents to model: ``train`` and ``validation``, with the column ``text``.

    ``name`` is "stdlib" (a document is a module), or as for ``load_labelled_text``, like the other arguments.

    Raises:
        FileNotFoundError, ValueError: There is no such data, or no column of text.

    Example:
        >>> load_plain_text("stdlib")["train"].column_names
        ['text']
    """
    splits = _stdlib(seed) if name == STDLIB else _load(name, config)
    column = find_column(next(iter(splits.values())).column_names, "text", text_column, _TEXT_COLUMNS)
    splits = splits.select_columns([column]).rename_columns({column: "text"})
    return train_and_validation(splits, name, seed, labelled=False)


@checked
def train_tokenizer(
    texts: Iterable[str], vocab_size: Annotated[int, Whole("[257, 10000000]")]
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer like GPT-2's, of at most ``vocab_size`` tokens, with those of a classifier.

    Raises:
        ValueError: ``vocab_size`` is too small for the 256 bytes and 3 special tokens.

    Example:
        >>> tokenizer = train_tokenizer(["a small text"], vocab_size=300)
        >>> tokenizer.decode(tokenizer("a small text")["input_ids"], skip_special_tokens=True)
        'a small text'
    """
    special = ["<pad>", "<cls>", "<end>"]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size must be at least {256 + len(special)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    numbers = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <end>", special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<cls>", eos_token="<end>", sep_token="<end>"
    )


def _load(name: str, config: str | None) -> DatasetDict:
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise ValueError(f"a file of text must be one of {', '.join(_READERS)}, got {name!r}")
            found = datasets.load_dataset(_READERS[path.suffix], data_files=str(path))
        else:
            found = datasets.load_dataset(name, config)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file, nor a folder, nor in the cache, and was not found on the Hub: {error}"
        ) from error
    return found


def _docstrings(seed: int) -> DatasetDict:
    """Docstrings by library, without the library's own name; training and validation come from different files."""
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
    """First paragraphs of the documentation of functions and classes."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and files that test a parser
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
    random.Random(seed).shuffle(found)
    return found
