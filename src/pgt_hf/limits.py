"""What arguments may be. One set of rules and one wording, for the command line and for Python.

A rule stands in a dataclass field's type, ``alpha: Annotated[float | None, Number("[0, 1]")]``, where whoever reads
the dataclass sees it and ``HfArgumentParser`` does not mind it. ``check_fields`` holds the values against the rules.
Errors name the argument, what is allowed and the value: TypeError for a wrong type, ValueError for a wrong value.
"""

import difflib
import functools
import inspect
import math
import operator
import os
import re
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "HUB_ID",
    "Count",
    "DataSet",
    "ExistingPath",
    "Folder",
    "ModelName",
    "Needs",
    "NonNegative",
    "Number",
    "OneOf",
    "Positive",
    "Rate",
    "RepoId",
    "Seed",
    "Share",
    "Text",
    "Whole",
    "Workers",
    "WritableFile",
    "WritableFolder",
    "check_fields",
    "check_needs",
    "check_type",
    "checked",
    "near",
]

P = ParamSpec("P")
R = TypeVar("R")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Number:
    """A number in an interval, ``"[0, 1)"``, or one of a few others that mean something else (``also``).

    Example:
        >>> Number("(0, 1]").check("layer_decay", 0)
        Traceback (most recent call last):
        ValueError: layer_decay must be a number in (0, 1], got 0
    """

    interval: str = "(-inf, inf)"
    also: tuple[float, ...] = ()

    kind = "a number"

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless ``value`` is allowed."""
        try:
            number = self.read(value)
        except (TypeError, ValueError, OverflowError):
            shown = f"{_shown(value)} of type {type(value).__name__}"
            raise TypeError(f"{name} must be {self}, got {shown}") from None
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = operator.le if self.interval[0] == "[" else operator.lt
        below = operator.le if self.interval[-1] == "]" else operator.lt
        if number not in self.also and not (math.isfinite(number) and above(low, number) and below(number, high)):
            raise ValueError(f"{name} must be {self}, got {_shown(value)}")

    def read(self, value: Any) -> float:
        """``value`` as a number of Python; numpy's scalars, ``Decimal`` and 0-dim tensors are numbers too."""
        kind = str(getattr(value, "dtype", type(value).__name__))
        if isinstance(value, (str, bytes, bytearray)) or "bool" in kind or "complex" in kind or _shape(value):
            raise TypeError
        return float(value)

    def __str__(self) -> str:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        words = f"{self.kind} in {self.interval}"
        if math.isinf(high):
            words = f"{self.kind} {'of at least' if self.interval[0] == '[' else 'above'} {low:g}"
            words = self.kind if math.isinf(low) else words
        return " or ".join([words, *(f"{number:g}" for number in self.also)])


class Whole(Number):
    """A whole number in an interval."""

    kind = "a whole number"

    def read(self, value: Any) -> float:
        """As for ``Number``; 3.0 is no whole number here, since it is no index either."""
        super().read(value)
        return operator.index(value)


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: Iterable[str]

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless ``value`` is among the names."""
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, str) and value in self.names:
            return
        message = f"{name} must be {self}, got {value!r}{near(value, self.names)}"
        raise ValueError(message) if isinstance(value, str) else TypeError(message)

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


class RepoId:
    """The name of a repository on the Hub: owner/name, or a name."""

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless it is one."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        check_type(name, value, str)
        try:
            validate_repo_id(value)
        except HFValidationError as error:
            raise ValueError(f"{name} must be owner/name, got {value!r}: {error}") from error


class Text:
    """A text that is not empty."""

    def __str__(self) -> str:
        return "a text"

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless it is one."""
        check_type(name, value, str)
        if not value.strip():
            raise ValueError(f"{name} must not be empty, got {value!r}")


@dataclass(frozen=True)
class Needs:
    """An argument that counts only where another has one of some values; given elsewhere, it would do nothing."""

    other: str
    values: tuple[Any, ...] = ()  # any that is not None, False or 0, if none is named

    def met(self, values: Mapping[str, Any]) -> bool:
        """Whether the other argument has such a value."""
        value = values.get(self.other)
        if not self.values:
            return value not in (None, False, 0)
        return any(item in self.values for item in (value if isinstance(value, list) else [value]))

    def __str__(self) -> str:
        return f"{self.other}{' ' * bool(self.values)}{' or '.join(str(value).lower() for value in self.values)}"


@dataclass(frozen=True)
class ExistingPath:
    """A file or folder that must be there, or one of a few words."""

    what: Literal["file", "folder"]
    words: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless it is there."""
        check_type(name, value, str, Path)
        if value in self.words:
            return
        path, words = Path(value), "".join(f"{word!r} or " for word in self.words)
        if not value or not (path.is_file() if self.what == "file" else path.is_dir()):
            found = "" if path.exists() and value else near(str(value), _beside(path))
            raise ValueError(f"{name} must be {words}a {self.what} that exists, got {str(value)!r}{found}")


@dataclass(frozen=True)
class WritableFolder:
    """A folder that can be written to, or made; that is tried, and leaves nothing behind."""

    what = "a folder that can be written to"

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless writing works."""
        check_type(name, value, str, Path)
        message = f"{name} must be {self.what}, got {str(value)!r}"
        if not str(value):
            raise ValueError(message)
        try:
            self.probe(Path(value))
        except (OSError, ValueError) as error:
            raise ValueError(f"{message}: {getattr(error, 'strerror', None) or error}") from error

    def probe(self, path: Path) -> None:
        """Writes into the folder, or into the nearest one above it that is there."""
        longest = max((len(part.encode()) for part in path.parts), default=0)
        if longest > 255:
            raise ValueError(f"a name of {longest} bytes is too long")
        folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name on Linux: a kill leaves nothing either
            file.write(b"0")


@dataclass(frozen=True)
class WritableFile(WritableFolder):
    """A file that can be written."""

    what = "a file that can be written"

    def probe(self, path: Path) -> None:
        """Writes beside the file; a file that is there stays as it is."""
        if path.is_dir():
            raise ValueError("it is a folder")
        if path.exists():
            with path.open("ab"):
                return
        super().probe(path.parent)


@dataclass(frozen=True)
class DataSet:
    """A data set's name: a file or folder that is there, an embedded one, or what may be a Hub id."""

    embedded: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless it is one of these."""
        check_type(name, value, str, os.PathLike)
        place = os.fspath(value)
        if place in self.embedded or (place and os.path.exists(place)):
            return
        meant = "" if "/" in place else near(place.casefold(), self.embedded)
        is_path = (
            meant
            or os.path.isabs(place)
            or place.count("/") > 1
            or place.startswith(".")
            or Path(place).suffix in _FILES
        )
        if is_path or not HUB_ID.fullmatch(place):
            words = "".join(f"{word!r}, " for word in self.embedded)
            raise ValueError(
                f"{name} must be {words}a file or folder that exists, or a Hub id such as owner/name, got {place!r}"
                f"{meant or near(place, _beside(Path(place)))}"
            )


_FILES = (".csv", ".parquet", ".json", ".jsonl", ".txt", ".zip", ".tar", ".jpg", ".png")


@dataclass(frozen=True)
class ModelName:
    """A model's name: one of a few words, the folder of a saved one, or what may be a Hub id."""

    words: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless it is one of these."""
        check_type(name, value, str, os.PathLike)
        place = os.fspath(value)
        folder = Path(place)
        if place in self.words or (place and any(folder.glob("*config.json")) and any(folder.iterdir())):
            return
        words = "".join(f"{word!r}, " for word in self.words)
        message = f"{name} must be {words}the folder of a saved one with its config, or a Hub id, got {place!r}"
        if not place or folder.exists() or not HUB_ID.fullmatch(place) or near(place, self.words):
            raise ValueError(message + near(place, self.words))


Count = Annotated[int, Whole("[1, inf)")]
Folder = Annotated[str, WritableFolder()]
NonNegative = Annotated[float, Number("[0, inf)")]
Positive = Annotated[float, Number("(0, inf)")]
Rate = Annotated[float, Number("(0, 1e6]")]
Seed = Annotated[int, Whole("[0, 4294967295]")]
Share = Annotated[float, Number("[0, 1]")]
Workers = Annotated[int, Whole("[0, 1024]")]


def check_type(name: str, value: Any, *allowed: type) -> None:
    """Raises TypeError unless ``value`` is of one of these types.

    Example:
        >>> check_type("model", None, torch.nn.Module)
        Traceback (most recent call last):
        TypeError: model must be a Module, got None of type NoneType
    """
    if not isinstance(value, allowed):
        words = " or ".join(f"a {kind.__name__}" for kind in allowed)
        raise TypeError(f"{name} must be {words}, got {_shown(value)} of type {type(value).__name__}")


def check_fields(kind: type, values: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
    """Holds values against the rules and types of a dataclass's fields.

    Args:
        kind: The dataclass.
        values: The values by field; fields that it lacks are not checked.
        more: Rules that are not in the fields' types, such as those of a dataclass's ``RULES``: of fields that it
            inherits from another library.

    Raises:
        TypeError, ValueError: One is not allowed; the message names it.

    Example:
        >>> check_fields(ImageTrainingArguments, {"mixup": -1})
        Traceback (most recent call last):
        ValueError: mixup must be a number of at least 0, got -1
    """
    hints = get_type_hints(kind, include_extras=True)
    for item in fields(kind):
        name, hint = item.name, hints[item.name]
        optional = types.NoneType in (*get_args(hint), *get_args(getattr(hint, "__origin__", None)))
        rule = (more or {}).get(name) or _rule(hint)
        if name not in values or rule is None or (values[name] is None and optional):
            continue
        if (
            hasattr(kind, "RULES")
            and name not in (more or {})
            and get_origin(hint) is not Annotated
            and not _is_plain(rule)
        ):
            continue  # what another library reads, and keeps, in ways of its own
        rule.check(name, values[name])
        if isinstance(rule, _Items) and isinstance(rule.rule, (Number, OneOf, DataSet)):
            items = list(values[name])
            if not items or any(item in items[:place] for place, item in enumerate(items)):
                raise ValueError(f"{name} must name at least one, and none twice, got {_shown(values[name])}")


def check_needs(kind: type, values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raises ValueError for an argument that was given, and whose ``Needs`` are not met.

    They stand in the fields' types, or, for fields that are inherited from another library, in the class's ``NEEDS``.
    """
    hints, more = get_type_hints(kind, include_extras=True), getattr(kind, "NEEDS", {})
    for name in sorted(set(given) & set(hints)):
        for rule in (*getattr(hints[name], "__metadata__", ()), more.get(name)):
            if isinstance(rule, Needs) and not rule.met(values):
                now = values.get(rule.other)
                raise ValueError(f"{name} counts only with {rule}, got {values[name]!r} with {rule.other} {now!r}")


def near(value: Any, names: Iterable[str]) -> str:
    """``; near: ...`` for a message, with the names that ``value`` may have meant; empty if there are none."""
    close = difflib.get_close_matches(value, list(names), n=3) if isinstance(value, str) else []
    return f"; near: {', '.join(close)}" if close else ""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Holds the arguments of every call against the types and rules of the function's annotations.

    Example:
        >>> @checked
        ... def fold(model: nn.Module, alpha: Annotated[float, Number("(0, 1]")]) -> None: ...
        >>> fold(nn.Linear(4, 3), alpha="half")
        Traceback (most recent call last):
        TypeError: alpha must be a number in (0, 1], got 'half' of type str
    """
    signature = inspect.signature(function)
    rules: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not rules:
            hints = _hints(function)
            rules.update({name: _rule(hint) for name, hint in hints.items() if name != "return"} or {"": None})
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python's own message names what is missing or too much
        for name, value in given.items():
            variadic = signature.parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            )
            if rules.get(name) is not None and not variadic:
                rules[name].check(name, value)
        return function(*args, **kwargs)

    return call


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations; without those that are texts, names which only type checkers import."""
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}


def _rule(hint: Any) -> Any:
    """The rule that an annotation is; None where it allows anything, or what only the function itself can judge."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:  # a class, as Python sees it
        return None
    if origin is Annotated:
        hint, own = inner[0], [rule for rule in inner[1:] if hasattr(rule, "check")]
        if not own:
            return _rule(hint)
        return _Either((_Kind(types.NoneType), *own)) if types.NoneType in get_args(hint) else own[0]
    if origin in (Union, types.UnionType):
        named = [each for each in inner if isinstance(each, type) and issubclass(each, Enum)]
        inner = tuple(each for each in inner if not named or each is not str)  # the text is one of those names
        members = tuple(_rule(each) for each in inner)
        if any("numpy" in getattr(each, "__module__", "") for each in inner) or None in members:
            return None
        return members[0] if len(members) == 1 else _Either(members)
    if origin is Literal:
        return OneOf(inner) if all(isinstance(name, str) for name in inner) else None
    if origin in _SIMPLE:
        return _SIMPLE[origin]
    if isinstance(origin, type) and issubclass(origin, Enum):
        return OneOf([str(member.value) for member in origin])
    if origin in (list, Iterable, Sequence, tuple):
        length = len(inner) if origin is tuple and Ellipsis not in inner else 0
        return _Items(_rule(inner[0]) if inner and len(set(inner) - {Ellipsis}) == 1 else None, length)
    if not isinstance(origin, type) or origin is object or getattr(origin, "_is_protocol", False):
        return None
    return _Kind(origin)


@dataclass(frozen=True)
class _Kind:
    kind: type

    def check(self, name: str, value: Any) -> None:
        check_type(name, value, self.kind)

    def __str__(self) -> str:
        return "None" if self.kind is types.NoneType else f"a {self.kind.__name__}"


@dataclass(frozen=True)
class _Either:
    rules: tuple[Any, ...]

    def check(self, name: str, value: Any) -> None:
        if value is None and any(rule == _Kind(types.NoneType) for rule in self.rules):
            return
        errors: list[Exception] = []
        for rule in self.rules:
            try:
                rule.check(name, value)
            except (TypeError, ValueError) as error:
                errors.append(error)
            else:
                return
        wrong_value = next((error for error in errors if isinstance(error, ValueError)), None)
        left = [rule for rule in self.rules if rule != _Kind(types.NoneType)]
        if wrong_value is not None or len(left) == 1:
            raise wrong_value or errors[self.rules.index(left[0])]
        words = " or ".join(str(rule) for rule in self.rules)
        raise TypeError(f"{name} must be {words}, got {_shown(value)} of type {type(value).__name__}")


def _is_plain(rule: Any) -> bool:
    """Whether it is of numbers, names and flags alone."""
    if isinstance(rule, _Either):
        return all(_is_plain(each) or each == _Kind(types.NoneType) for each in rule.rules)
    return isinstance(rule, (Number, OneOf, _TrueOrFalse))


@dataclass(frozen=True)
class _Items:
    rule: Any
    length: int = 0

    def check(self, name: str, value: Any) -> None:
        if (
            isinstance(value, (str, bytes, Mapping))
            or not hasattr(value, "__iter__")
            or getattr(value, "shape", 1) == ()
        ):
            raise TypeError(f"{name} must be {self}, got {_shown(value)} of type {type(value).__name__}")
        if not hasattr(value, "__len__"):
            return  # a generator is not to be used up
        if self.length and len(value) != self.length:
            raise ValueError(f"{name} must be {self}, got {_shown(value)}")
        if self.rule is not None:
            for item in value:
                self.rule.check(name, item)

    def __str__(self) -> str:
        return f"{self.length} values" if self.length else "a list"


class _TrueOrFalse:
    def check(self, name: str, value: Any) -> None:
        if type(value).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name} must be true or false, got {_shown(value)}")

    def __str__(self) -> str:
        return "true or false"


_SIMPLE: dict[Any, Any] = {float: Number(), int: Whole(), bool: _TrueOrFalse(), types.NoneType: _Kind(types.NoneType)}


def _shown(value: Any) -> str:
    """A value for a message, in one line that is not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:77]}..."


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _beside(path: Path) -> list[str]:
    with suppress(OSError):
        return [str(path.parent / found.name) for found in path.parent.iterdir()]
    return []
