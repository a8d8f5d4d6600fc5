"""Two gloo processes on the CPU: DDP and FSDP2 give the gradients of one process with the whole batch."""

import os
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from reference import powergrad_gradient
from torch import nn

from pgt_hf import attach_powergrad, create_optimizer

pytestmark = pytest.mark.slow

ALPHA = 0.25
KINDS = ("plain", "transformers")
WRAPPERS = ("optimizer before DDP", "attached after DDP", "fsdp2")


def build(kind):
    torch.manual_seed(0)
    if kind == "plain":
        return timm.create_model("resnet10t", num_classes=5, norm_layer=nn.Identity).double().train()
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).double().train()


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(8) % 5


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def gradients(kind, wrapper, images, target):
    """Of one backward pass, whole, and how often PGT acted."""
    model = module = build(kind)
    if wrapper == "fsdp2":
        handle = attach_powergrad(model, alpha=ALPHA)
        shard(model)
    elif wrapper == "attached after DDP":
        module = nn.parallel.DistributedDataParallel(model)
        handle = attach_powergrad(module, alpha=ALPHA)
    elif wrapper == "optimizer before DDP":
        optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
        handle = optimizer.powergrad
        module = nn.parallel.DistributedDataParallel(model, static_graph=True)
    F.cross_entropy(logits_of(module(images)), target).backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return grads, handle.calls


def trained(wrapper, images, target):
    """The weights after three updates of a network with batch norm left out."""
    model = build("plain")
    module = shard(model) if wrapper == "fsdp2" else nn.parallel.DistributedDataParallel(model)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.05, alpha=ALPHA, **options)
    for _ in range(3):
        F.cross_entropy(module(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [weight.detach() for weight in weights]


def worker(rank, port, path):
    """All cases one after the other, each process on its half of the batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    half = [tensor[rank * 4 : rank * 4 + 4] for tensor in batch()]
    found = {(kind, wrapper): gradients(kind, wrapper, *half) for kind in KINDS for wrapper in WRAPPERS}
    found |= {wrapper: trained(wrapper, *half) for wrapper in ("fsdp2", "ddp")}
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed") / "found.pt"
    mp.spawn(worker, (free_port(), path), nprocs=2, join=True)
    return torch.load(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_give_the_gradient_of_one(found, kind, wrapper):
    ours, calls = found[kind, wrapper]
    assert calls == 1

    model, (images, target) = build(kind), batch()
    logits = logits_of(model(images))
    logits.backward(powergrad_gradient(logits, target, ALPHA))
    for grad, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-10)


def test_fsdp2_trains_as_ddp_does(found):
    for ours, theirs in zip(found["fsdp2"], found["ddp"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
