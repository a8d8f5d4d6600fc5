"""What test_parallel.py launches on two CPU processes: each way to distribute a model, against the formula."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from programs import CLASSES, Net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from pgt_hf import attach_powergrad, bind_powergrad, create_optimizer

ALPHA = 0.25


def net():
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


def mine(tensor):
    """This rank's half of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def by_formula():
    model, (inputs, target) = net(), data()
    logits = model(inputs)
    logits.backward((torch.softmax(ALPHA * logits.detach(), -1) - F.one_hot(target, CLASSES)) / len(target))
    return [parameter.grad for parameter in model.parameters()]


def check(model):
    for parameter, expected in zip(model.parameters(), by_formula(), strict=True):
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)


def ddp(compiled=False, **options):
    model, (inputs, target) = net(), data()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    wrapped = DistributedDataParallel(model, **options)
    program = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(program(mine(inputs)), mine(target)).backward()
        if optimizer.powergrad.calls == 1:
            check(model)
        optimizer.step()


def fsdp2(attach_first):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, (inputs, target) = net(), data()
    handle = attach_powergrad(model, ALPHA) if attach_first else None
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    handle = handle or attach_powergrad(model, ALPHA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(mine(inputs)), mine(target)).backward()
    check(model)
    optimizer.step()
    assert handle.calls == 1


def tensor_parallel_head():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, (inputs, target) = net(), data()
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    attach_powergrad(model, ALPHA)
    F.cross_entropy(model(inputs), target).backward()
    check(model)


def sharded_vocabulary():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, (inputs, _) = net(), data()
    parallelize_module(model, mesh, {"head": ColwiseParallel(use_local_output=False)})
    attach_powergrad(model, ALPHA)
    with pytest.raises(NotImplementedError, match=r"output_layouts=Replicate\(\)"):
        model(inputs)


def sharded_optimizer():
    model, (inputs, target) = net(), data()
    optimizer = bind_powergrad(
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1), model, alpha=ALPHA
    )
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(mine(inputs)), mine(target)).backward()
        optimizer.step()
    assert optimizer.powergrad.calls == 2


CASES = {
    "ddp": ddp,
    "ddp-static-graph": lambda: ddp(static_graph=True),
    "ddp-unused-parameters": lambda: ddp(find_unused_parameters=True),
    "ddp-compiled": lambda: ddp(compiled=True),
    "fsdp2-attached-first": lambda: fsdp2(True),
    "fsdp2-attached-after": lambda: fsdp2(False),
    "tensor-parallel-head": tensor_parallel_head,
    "sharded-vocabulary": sharded_vocabulary,
    "zero-redundancy-optimizer": sharded_optimizer,
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in sys.argv[1:] or CASES:
        torch._dynamo.reset()
        CASES[name]()
        if dist.get_rank() == 0:
            print(f"passed {name}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
