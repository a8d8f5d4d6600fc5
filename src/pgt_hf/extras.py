"""Optional packages, and the extra that installs each."""

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
    """Raises the error of ``missing`` if a package is not installed."""
    if find_spec(package) is None:
        raise missing(package, purpose)


def missing(package: str | None, purpose: str, extra: str | None = None) -> ImportError:
    """The error for a package that is not installed; it names the extra that installs it.

    Example:
        >>> str(missing("peft", "LoRA"))
        "LoRA needs peft: pip install 'pgt_hf[lora]'"
    """
    root = (package or "").partition(".")[0]
    wanted = f"pgt_hf[{extra or _EXTRAS[root]}]" if root in _EXTRAS else root
    return ImportError(f"{purpose} needs {root}: pip install {wanted!r}")
