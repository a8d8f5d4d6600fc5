"""Safetensors files rewritten byte by byte: other names for the tensors, and each aligned in the file."""

import json
import os
import struct
from typing import Any

from ..atomic import replacing
from ..limits import checked

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of a CPU


@checked
def rewrite_safetensors(
    source: str | os.PathLike[str], target: str | os.PathLike[str], remove_prefix: str = ""
) -> None:
    """Copies a safetensors file, removes a prefix from the tensors' names, and aligns the tensors in the file.

    transformers computes directly on the memory-mapped file, and some convolutions and matrix products round
    differently if a weight does not start at a multiple of 64 bytes. A model loaded from an aligned file computes the
    logits of the saved model, bit for bit. The format allows no gaps, so tensors whose size is no multiple of 64
    bytes, mostly biases and counters, come last and may stay unaligned.
    """
    tensors = read_header(source)
    metadata = tensors.pop("__metadata__", {"format": "pt"})
    spans = {name: tensor["data_offsets"] for name, tensor in tensors.items()}

    def rank(name: str) -> tuple[bool, bool, str]:
        begin, end = spans[name]
        return bool((end - begin) % ALIGNMENT), len(tensors[name]["shape"]) < 2, name

    order = sorted(tensors, key=rank)
    header, offset = {"__metadata__": metadata}, 0
    for name in order:
        size = spans[name][1] - spans[name][0]
        header[name.removeprefix(remove_prefix)] = tensors[name] | {"data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    with replacing(target) as draft, open(source, "rb") as file, draft.open("wb") as output:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        output.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.seek(start + spans[name][0])
            output.write(file.read(spans[name][1] - spans[name][0]))


@checked
def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The names, types, shapes and offsets of a safetensors file's tensors, and its ``__metadata__``."""
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > os.path.getsize(path):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("the header is no table of tensors")
            return header
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
