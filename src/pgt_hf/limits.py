"""What arguments may be: one set of rules with one wording, for the command line and for Python.

A rule stands in an annotation, ``alpha: Annotated[float | None, Number("[0, 1]")]``, of a dataclass's field
(``check_fields``) or of a function's parameter (``checked``). Errors name the argument, what is allowed and the value:
TypeError for a wrong type, ValueError for a wrong value.
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
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "HUB_ID", "Count", "DataSet", "Epochs", "ExistingPath", "Folder", "ModelName", "Needs", "NonNegative", "Number",
    "OneOf", "Positive", "Rate", "RepoId", "Rule", "Seed", "Share", "Text", "Whole", "Workers", "WritableFile",
    "WritableFolder", "WrongRunError", "check_fields", "check_needs", "check_type", "checked", "near", "rule_for",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
HUB_ID = re.compile(r"(?!.{97})[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class WrongRunError(ValueError):
    """A checkpoint was made by another run than the one that is to go on; a program says so in one line."""


class Rule:
    """What a value may be. ``str`` of a rule completes the sentence "the argument must be ..."."""

    types: tuple[type, ...] = (str,)
    words = ""

    def fits(self, value: Any) -> bool:
        """Whether the value has the right type."""
        return isinstance(value, self.types)

    def fault(self, value: Any) -> str | None:
        """None for an allowed value, else what the message adds: "" or a hint such as ``; near: agc``."""
        return None

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless ``value`` is allowed."""
        if not self.fits(value):
            raise TypeError(f"{name} must be {self}, got {_shown(value)} of type {type(value).__name__}")
        if (hint := self.fault(value)) is not None:
            raise ValueError(f"{name} must be {self}, got {_shown(value)}{hint}")

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Number(Rule):
    """A number in an interval, ``"[0, 1)"``, or one of ``also``, which mean something else.

    Example:
        >>> Number("(0, 1]").check("layer_decay", 0)
        Traceback (most recent call last):
        ValueError: layer_decay must be a number in (0, 1], got 0
    """

    interval: str = "(-inf, inf)"
    also: tuple[float, ...] = ()

    kind = "a number"

    def fits(self, value: Any) -> bool:
        """Numbers, those of numpy and ``Decimal`` included, and 0-dim tensors."""
        kind = str(getattr(value, "dtype", type(value).__name__))
        if isinstance(value, (str, bytes, bytearray)) or "bool" in kind or "complex" in kind:
            return False
        try:
            return not tuple(getattr(value, "shape", ())) and self.read(value) is not None
        except (TypeError, ValueError, OverflowError):
            return False

    def read(self, value: Any) -> float:
        """The value as a Python number."""
        return float(value)

    def fault(self, value: Any) -> str | None:
        number, (low, high) = self.read(value), self._ends
        above = operator.le if self.interval[0] == "[" else operator.lt
        below = operator.le if self.interval[-1] == "]" else operator.lt
        inside = math.isfinite(number) and above(low, number) and below(number, high)
        return None if inside or number in self.also else ""

    @property
    def _ends(self) -> tuple[float, ...]:
        return tuple(map(float, self.interval[1:-1].split(",")))

    def __str__(self) -> str:
        low, high = self._ends
        words = f"{self.kind} in {self.interval}"
        if math.isinf(high):
            words = f"{self.kind} {'of at least' if self.interval[0] == '[' else 'above'} {low:g}"
            words = self.kind if math.isinf(low) else words
        return " or ".join([words, *(f"{number:g}" for number in self.also)])


class Whole(Number):
    """A whole number in an interval; 3.0 is none, since it cannot be an index."""

    kind = "a whole number"

    def read(self, value: Any) -> float:
        super().read(value)  # refuses what is too large for a float
        return operator.index(value)

    def fault(self, value: Any) -> str | None:
        return super().fault(value) if abs(operator.index(value)) < 2**63 else "; no counter goes that far"


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some names."""

    names: Iterable[str]

    types = (str, Enum)

    def fault(self, value: Any) -> str | None:
        name = value.value if isinstance(value, Enum) else value
        return None if name in self.names else near(name, self.names)

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


class RepoId(Rule):
    """The name of a repository on the Hub."""

    words = "owner/name"

    def fault(self, value: Any) -> str | None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(value)
        except HFValidationError as error:
            return f": {error}"
        return None


class Text(Rule):
    """A text that is not empty."""

    words = "a text that is not empty"

    def fault(self, value: Any) -> str | None:
        return None if value.strip() else ""


@dataclass(frozen=True)
class Needs:
    """An argument that has an effect only if another one has one of these values; else giving it is an error."""

    other: str
    values: tuple[Any, ...] = ()  # if empty: anything but None, False and 0

    def met(self, values: Mapping[str, Any]) -> bool:
        """Whether the other argument has such a value."""
        value = values.get(self.other)
        if not self.values:
            return value not in (None, False, 0)
        return any(item in self.values for item in (value if isinstance(value, list) else [value]))

    def __str__(self) -> str:
        return f"{self.other}{' ' * bool(self.values)}{' or '.join(str(value).lower() for value in self.values)}"


@dataclass(frozen=True)
class ExistingPath(Rule):
    """A file or folder that exists, or one of a few names."""

    what: Literal["file", "folder"]
    names: tuple[str, ...] = ()

    types = (str, os.PathLike)

    def fault(self, value: Any) -> str | None:
        place = os.fspath(value)
        if value in self.names or (os.path.isfile(place) if self.what == "file" else os.path.isdir(place)):
            return None
        return "" if os.path.exists(place) else near(place, _beside(Path(place)))

    def __str__(self) -> str:
        return f"{''.join(f'{name!r} or ' for name in self.names)}a {self.what} that exists"


class WritableFolder(Rule):
    """A folder that can be written to, or created; this is tried, and leaves nothing behind."""

    types = (str, os.PathLike)
    words = "a folder that can be written to"

    def fault(self, value: Any) -> str | None:
        if not str(value):
            return ""
        try:
            self.probe(Path(value))
        except (OSError, ValueError) as error:
            return f": {getattr(error, 'strerror', None) or error}"
        return None

    def probe(self, path: Path) -> None:
        """Writes into the folder, or into the nearest existing one above it."""
        if "\0" in str(path):
            raise ValueError("a name cannot hold the character NUL")
        longest = max((len(part.encode()) for part in path.parts), default=0)
        if longest > 255:
            raise ValueError(f"a name of {longest} bytes is too long")
        folder = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
        if folder.is_symlink() and not folder.exists():
            raise ValueError("it is a link that leads nowhere")
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name on Linux, so that a kill leaves nothing either
            file.write(b"0")


@dataclass(frozen=True)
class WritableFile(WritableFolder):
    """A file that can be written; an existing one stays as it is."""

    suffix: str = ""

    def __str__(self) -> str:
        return f"a {self.suffix and f'{self.suffix} '}file that can be written"

    def probe(self, path: Path) -> None:
        if self.suffix and path.suffix != self.suffix:
            raise ValueError(f"its name must end in {self.suffix}")
        if path.is_dir():
            raise ValueError("it is a folder")
        if path.exists():
            with path.open("ab"):
                return
        super().probe(path.parent)


@dataclass(frozen=True)
class DataSet(Rule):
    """A data set: an existing file or folder, an embedded one by name, or what may be a Hub id."""

    embedded: tuple[str, ...] = ()

    types = (str, os.PathLike)

    def fault(self, value: Any) -> str | None:
        place = os.fspath(value)
        if place in self.embedded or (place and os.path.exists(place)):
            return None
        if meant := "" if "/" in place else near(place.casefold(), self.embedded):
            return meant
        is_path = os.path.isabs(place) or place.count("/") > 1 or place.startswith(".") or Path(place).suffix in _FILES
        return near(place, _beside(Path(place))) if is_path or not HUB_ID.fullmatch(place) else None

    def __str__(self) -> str:
        words = "".join(f"{word!r}, " for word in self.embedded)
        return f"{words}a file or folder that exists, or a Hub id such as owner/name"


_FILES = (".csv", ".parquet", ".json", ".jsonl", ".txt", ".zip", ".tar", ".jpg", ".png")


@dataclass(frozen=True)
class ModelName(Rule):
    """A model: the folder of a saved one, one of a few names, or what may be a Hub id."""

    names: tuple[str, ...] = ()

    types = (str, os.PathLike)

    def fault(self, value: Any) -> str | None:
        place, folder = os.fspath(value), Path(value)
        if place in self.names or (os.path.isdir(place) and any(folder.glob("*config.json"))):
            return None
        close = near(place, self.names)
        return close if not place or os.path.exists(place) or not HUB_ID.fullmatch(place) or close else None

    def __str__(self) -> str:
        words = "".join(f"{name!r}, " for name in self.names)
        return f"{words}the folder of a saved one with its config, or a Hub id"


Count = Annotated[int, Whole("[1, inf)")]
Epochs = Annotated[float, Number("(0, 1e9]")]
Folder = Annotated[str, WritableFolder()]
NonNegative = Annotated[float, Number("[0, inf)")]
Positive = Annotated[float, Number("(0, inf)")]
Rate = Annotated[float, Number("(0, 1e6]")]
Seed = Annotated[int, Whole("[0, 4294967295]")]
Share = Annotated[float, Number("[0, 1]")]
Workers = Annotated[int, Whole("[0, 1024]")]


def check_type(name: str, value: Any, *allowed: type) -> None:
    """Raises TypeError unless ``value`` has one of these types."""
    _Kind(allowed).check(name, value)


def check_fields(kind: type, values: Mapping[str, Any], rules: Mapping[str, Any] | None = None) -> None:
    """Checks values against the annotations of a dataclass's fields.

    Args:
        kind: The dataclass. If it has ``RULES``, it inherits fields from another library: of those, only the ones in
            ``rules``, and numbers, names and flags, are checked.
        values: The values by field; missing fields are not checked.
        rules: Rules that replace annotations.

    Raises:
        TypeError, ValueError: One is not allowed; the message names it.
    """
    hints = get_type_hints(kind, include_extras=True)
    for name in [item.name for item in fields(kind) if item.name in values]:
        hint, value = hints[name], values[name]
        if rules and name in rules:
            rule = _or_none(rules[name], hint)
        else:
            rule = rule_for(hint)
            if hasattr(kind, "RULES") and get_origin(hint) is not Annotated and not _is_plain(rule):
                continue  # the other library reads these in its own way
        if rule is not None:
            rule.check(name, value)
        if isinstance(rule, _Items) and (not len(value) or any(item in value[:i] for i, item in enumerate(value))):
            raise ValueError(f"{name} must name at least one, and none twice, got {_shown(value)}")


def check_needs(kind: type, values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raises ValueError for a given argument whose ``Needs`` are not met.

    They stand in the annotations or, for fields that another library has, in the class's ``NEEDS``.
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
    """Checks the arguments of every call against the function's annotations.

    Example:
        >>> @checked
        ... def fold(model: nn.Module, alpha: Annotated[float, Number("(0, 1]")]) -> None: ...
        >>> fold(nn.Linear(4, 3), alpha="half")
        Traceback (most recent call last):
        TypeError: alpha must be a number in (0, 1], got 'half' of type str
    """
    signature = inspect.signature(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind not in variadic]

    @functools.cache
    def rules() -> dict[str, Any]:
        hints = _hints(function)
        return {name: rule for name in names if name in hints and (rule := rule_for(hints[name])) is not None}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python's own message says what is missing or too much
        for name, rule in rules().items():
            if name in given:
                rule.check(name, given[name])
        return function(*args, **kwargs)

    return call


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations, except strings: names that only type checkers import."""
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}


def rule_for(hint: Any) -> Any:
    """The rule that an annotation stands for; None if it allows anything, or only the function can judge."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        own = [rule for rule in inner[1:] if hasattr(rule, "check")]
        return _or_none(own[0], hint) if own else rule_for(inner[0])
    if origin in (Union, types.UnionType):
        inner = tuple(each for each in inner if each is not types.NoneType)
        if any(_is_enum(each) for each in inner):
            inner = tuple(each for each in inner if each is not str)  # the text is one of the enum's names
        members = tuple(rule_for(each) for each in inner)
        if None in members or any("numpy" in getattr(each, "__module__", "") for each in inner):
            return None
        return _or_none(members[0] if len(members) == 1 else _Either(members), hint)
    if origin is Literal:
        return OneOf(inner) if all(isinstance(name, str) for name in inner) else None
    if origin in _SIMPLE:
        return _SIMPLE[origin]
    if _is_enum(origin):
        return OneOf([str(member.value) for member in origin])
    if origin in (list, Iterable, Sequence, tuple):
        length = len(inner) if origin is tuple and Ellipsis not in inner else 0
        return _Items(rule_for(inner[0]) if len(set(inner) - {Ellipsis}) == 1 else None, length)
    if not isinstance(origin, type) or origin in (Any, object) or getattr(origin, "_is_protocol", False):
        return None
    return _Kind((origin,))


def _or_none(rule: Any, hint: Any) -> Any:
    """The rule, or None if the annotation allows that."""
    hint = hint.__origin__ if get_origin(hint) is Annotated else hint
    return _Optional(rule) if types.NoneType in get_args(hint) else rule


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_plain(rule: Any) -> bool:
    """Whether it is of numbers, names and flags alone."""
    if isinstance(rule, _Optional):
        return _is_plain(rule.rule)
    return all(map(_is_plain, rule.rules)) if isinstance(rule, _Either) else isinstance(rule, (Number, OneOf, _Flag))


@dataclass(frozen=True)
class _Kind(Rule):
    types: tuple[type, ...]

    def __str__(self) -> str:
        plain = {"Callable": "a function", "NoneType": "None"}
        names = [kind.__name__ for kind in self.types]
        *others, last = (plain.get(name, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}") for name in names)
        return f"{', '.join(others)} or {last}" if others else last


class _Flag(Rule):
    words = "true or false"

    def fits(self, value: Any) -> bool:
        return type(value).__name__ in ("bool", "bool_")  # numpy's is called either


@dataclass(frozen=True)
class _Optional(Rule):
    rule: Any

    def check(self, name: str, value: Any) -> None:
        if value is not None:
            self.rule.check(name, value)


@dataclass(frozen=True)
class _Either(Rule):
    rules: tuple[Any, ...]

    def check(self, name: str, value: Any) -> None:
        wrong_value = None
        for rule in self.rules:
            try:
                return rule.check(name, value)
            except TypeError:
                continue
            except ValueError as error:
                wrong_value = error
        raise wrong_value or TypeError(f"{name} must be {self}, got {_shown(value)} of type {type(value).__name__}")

    def __str__(self) -> str:
        return " or ".join(map(str, self.rules))


@dataclass(frozen=True)
class _Items(Rule):
    rule: Any
    length: int = 0

    def fits(self, value: Any) -> bool:
        is_list = hasattr(value, "__iter__") and getattr(value, "shape", None) != ()
        return is_list and not isinstance(value, (str, bytes, Mapping))

    def check(self, name: str, value: Any) -> None:
        super().check(name, value)
        for item in value if self.rule is not None and hasattr(value, "__len__") else ():  # no generator is used up
            self.rule.check(name, item)

    def fault(self, value: Any) -> str | None:
        return "" if self.length and len(value) != self.length else None

    def __str__(self) -> str:
        return f"{self.length} values" if self.length else "a list"


_SIMPLE: dict[Any, Rule] = {float: Number(), int: Whole(), bool: _Flag()}


def _shown(value: Any) -> str:
    """A value for a message, in one line that is not too long."""
    text = " ".join(repr(os.fspath(value) if isinstance(value, os.PathLike) else value).split())
    return text if len(text) < 80 else f"{text[:77]}..."


def _beside(path: Path) -> list[str]:
    try:
        return [str(path.parent / found.name) for found in path.parent.iterdir()]
    except OSError:
        return []
