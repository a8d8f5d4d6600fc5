"""Safetensors rewritten: the same tensors, other names, aligned; checkpoints packed and unpacked: the same bits."""

import json
import pickle
import random

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pgt_hf.hub import prepare_release, pull_checkpoint
from pgt_hf.hub.checkpoint_files import pack_checkpoint, unpack_checkpoint
from pgt_hf.hub.safetensors_layout import ALIGNMENT, read_header, rewrite_safetensors
from pgt_hf.images import create_model, load_classifier

TENSORS = {
    "net.a": torch.randn(3),
    "net.b": torch.randn(16, 4),
    "net.c": torch.arange(1),
    "net.d": torch.randn(5, 7, dtype=torch.bfloat16),
    "net.e": torch.randn(32).half(),
    "f": torch.zeros(0, 4),
}


def test_tensors_stay_the_same_under_names_without_the_prefix(tmp_path):
    save_file(TENSORS, tmp_path / "in.safetensors", metadata={"format": "pt", "by": "me"})
    rewrite_safetensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors", remove_prefix="net.")
    out = load_file(tmp_path / "out.safetensors")
    assert set(out) == {"a", "b", "c", "d", "e", "f"}
    for name, tensor in TENSORS.items():
        assert (
            torch.equal(out[name.removeprefix("net.")], tensor)
            and out[name.removeprefix("net.")].dtype is tensor.dtype
        )
    assert read_header(tmp_path / "out.safetensors")["__metadata__"] == {"format": "pt", "by": "me"}


def test_tensors_of_whole_vectors_begin_on_a_boundary(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    rewrite_safetensors(tmp_path / "w.safetensors", tmp_path / "w.safetensors")
    start = 8 + int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
    for name, entry in read_header(tmp_path / "w.safetensors").items():
        if name != "__metadata__" and (entry["data_offsets"][1] - entry["data_offsets"][0]) % ALIGNMENT == 0:
            assert (start + entry["data_offsets"][0]) % ALIGNMENT == 0, name


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_released_model_computes_the_same_bits_as_the_one_in_memory(name, tmp_path):
    # Three classes and channels that are no multiple of 16: a file as save_pretrained writes it is not aligned.
    model = create_model(name, ["ant", "bee", "cat"], image_size=32).eval()
    model.save_pretrained(tmp_path / "run")
    prepare_release(tmp_path / "run", tmp_path / "release", "alice/ants")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).logits
        for again in (
            load_classifier(tmp_path / "release"),
            timm.create_model(f"local-dir:{tmp_path}/release", pretrained=True),
        ):
            output = again.eval()(images)
            assert torch.equal(getattr(output, "logits", output), expected)


@pytest.mark.parametrize("content", [b"", b"12345", pickle.dumps({"a": 1}), b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_file_of_another_kind_is_an_error(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        rewrite_safetensors(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def checkpoint(folder, **states):
    folder.mkdir()
    state = {"global_step": 7, "log_history": [], "best_model_checkpoint": str(folder)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for name, value in states.items():
        torch.save(value, folder / f"{name}.pt")
    (folder / "training_args.bin").write_bytes(pickle.dumps({"hub_token": "secret"}))
    return folder


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs) and ours.dtype is theirs.dtype
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs and type(ours) is type(theirs)


def test_state_comes_back_as_it_was(tmp_path):
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    states = {
        "optimizer": optimizer.state_dict(),
        "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()},  # noqa: NPY002
        "odd": {"none": None, "true": True, 3: (1, 2.5, float("inf")), "text": "a", "empty": [], "shared": [0.1, {}]},
    }
    folder = checkpoint(tmp_path / "checkpoint-7", **states)
    packed = pack_checkpoint(folder, tmp_path / "packed")
    names = {path.name for path in packed.iterdir()}
    assert names == {"trainer_state.json"} | {f"{name}.pt.packed.safetensors" for name in states}
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in packed.iterdir())
    back = unpack_checkpoint(packed, tmp_path / "elsewhere")
    assert back == tmp_path / "elsewhere" / "checkpoint-7"
    assert json.loads((back / "trainer_state.json").read_text())["best_model_checkpoint"] == str(back)
    for name, value in states.items():
        assert same(value, torch.load(back / f"{name}.pt", weights_only=False)), name


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a/../../x", "C:\\x", "x\0y", "*", ""])
def test_name_from_elsewhere_does_not_leave_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be the name of a folder in the repository"):
        pull_checkpoint("alice/digits", tmp_path / "run", checkpoint=name)
    with pytest.raises(ValueError, match="repo_id must be owner/name"):
        pull_checkpoint(name, tmp_path / "run")
    packed = pack_checkpoint(checkpoint(tmp_path / "checkpoint-7"), tmp_path / "packed")
    state = json.loads((packed / "trainer_state.json").read_text())
    for step in (name, -1, 1.5, None):
        (packed / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
        with pytest.raises((TypeError, ValueError), match="global_step must be"):
            unpack_checkpoint(packed, tmp_path / "run")
    (packed / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": f"{tmp_path}/{name}"}))
    back = unpack_checkpoint(packed, tmp_path / "run")
    best = json.loads((back / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best is None or best.startswith(str(tmp_path / "run" / "checkpoint-"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7", "packed", "run"]


def test_object_that_is_no_state_is_an_error(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-7", strange={"dtype": torch.float32})
    with pytest.raises(TypeError, match="cannot be packed: it holds a dtype"):
        pack_checkpoint(folder, tmp_path / "packed")


def test_folder_that_is_no_checkpoint_and_one_that_is_there_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for function in (pack_checkpoint, unpack_checkpoint):
        with pytest.raises(FileNotFoundError, match="is no checkpoint"):
            function(tmp_path / "empty", tmp_path / "out")
    packed = pack_checkpoint(checkpoint(tmp_path / "checkpoint-7"), tmp_path / "packed")
    with pytest.raises(FileExistsError, match="checkpoint-7 is there already"):
        unpack_checkpoint(packed, tmp_path)
