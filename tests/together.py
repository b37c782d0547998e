"""Two processes that train together on this machine, over gloo."""

import os
import socket
import subprocess
import sys

from places import TESTS


def run_together(script, *arguments):
    """Run a Python file in both, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    path = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def wrapped(model, kind):
    """The model in the wrapper that this process trains it in: ``"ddp"``, ``"fsdp2"``, ``"fsdp1"``, or none."""
    import torch

    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return model


def step(model, optimizer, generator):
    """A step on four examples that this process draws."""
    import torch

    optimizer.zero_grad()
    model(torch.randn(4, 6, generator=generator)).square().mean().backward()
    optimizer.step()
