"""Packages that only a part of this one needs, and the extra that brings each."""

from importlib.util import find_spec

__all__ = ["missing", "require"]

_EXTRAS = {
    "PIL": "images",
    "datasets": "images",
    "evaluate": "images",
    "huggingface_hub": "hub",
    "matplotlib": "plots",
    "optuna": "search",
    "peft": "lora",
    "pyarrow": "images",
    "scipy": "images",
    "sklearn": "images",
    "sqlalchemy": "search",
    "tokenizers": "text",
    "torchvision": "images",
}


def require(package: str, purpose: str) -> None:
    """Says, before any work is done, that a package is missing.

    Args:
        package: As it is imported.
        purpose: What it is needed for, as the message begins.

    Raises:
        ImportError: It is not installed; the message names the extra.

    Example:
        >>> require("peft", "LoRA")
    """
    if find_spec(package) is None:
        raise missing(package, purpose)


def missing(package: str | None, purpose: str) -> ImportError:
    """The error that ``require`` raises.

    Example:
        >>> str(missing("peft", "LoRA"))
        "LoRA needs peft: pip install 'pgt_hf[lora]'"
    """
    root = (package or "").partition(".")[0]
    extra = f"pgt_hf[{_EXTRAS[root]}]" if root in _EXTRAS else root
    return ImportError(f"{purpose} needs {root}: pip install {extra!r}")
