"""util/dist.py: devices and precision by flag, and two real processes over gloo."""

import datetime
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.processes.forked import run_processes
from util import dist

WORKER = """
import json, sys
from pathlib import Path
import torch
from util import dist

device = dist.init("cpu")
found = {"rank": dist.rank(), "world": dist.world_size(), "main": dist.is_main(), "device": device.type}
x = torch.tensor([1.0, 10.0]) * (dist.rank() + 1)
found["sum"] = dist.all_reduce_sum(x.clone()).tolist()
found["mean"] = dist.all_reduce_mean(x.clone()).tolist()
found["gathered"] = dist.gather_objects({"rank": dist.rank(), "text": "x" * dist.rank()})
found["broadcast"] = dist.broadcast_from_main("of rank 0" if dist.is_main() else None)
for name, mine in (("both fine", None), ("one fails", ValueError("bad file 7") if dist.rank() == 1 else None)):
    try:
        dist.agree(mine)
        found[name] = "no error"
    except ValueError as error:
        found[name] = str(error)
dist.barrier()
Path(sys.argv[1], f"{dist.rank()}.json").write_text(json.dumps(found))
dist.shutdown()
assert dist.world_size() == 1
"""


def test_two_processes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    result = run_processes([tmp_path / "worker.py", tmp_path], nproc=2)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert (found["rank"], found["world"], found["main"], found["device"]) == (rank, 2, rank == 0, "cpu")
        assert found["sum"] == [3, 30] and found["mean"] == [1.5, 15]
        assert found["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
        assert found["broadcast"] == "of rank 0"
        # together, also where nothing went wrong
        assert found["both fine"] == "no error" and found["one fails"] == "bad file 7"


def test_one_process():
    """Nothing to wait for: every function is the identity."""
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    x = torch.tensor([1.0, 2.0])
    assert dist.all_reduce_mean(x) is x and dist.all_reduce_sum(x) is x and x.tolist() == [1, 2]
    assert dist.gather_objects("a") == ["a"] and dist.broadcast_from_main("a") == "a"
    dist.agree(None)
    with pytest.raises(OSError, match="mine"):
        dist.agree(OSError("mine"))
    dist.barrier()
    dist.shutdown()
    assert dist.init("cpu") == torch.device("cpu") and not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------- devices


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


def test_without_a_gpu(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    assert dist.pick_device("auto") == dist.pick_device("cpu") == torch.device("cpu")
    for flag in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"--device {flag} was asked for.*no CUDA.*--device cpu"):
            dist.pick_device(flag)


def test_with_gpus(monkeypatch):
    pretend_gpus(monkeypatch, 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert dist.pick_device("auto") == dist.pick_device("cuda") == torch.device("cuda", 0)
    assert dist.pick_device("cuda:1") == torch.device("cuda", 1) and dist.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="CUDA device 2, but there are 2.*--nproc_per_node"):
        dist.pick_device("cuda")


@pytest.mark.parametrize("flag", ["gpu", "cuda:", "cuda:x", "cuda0", "", "mps", "CPU"])
def test_devices_that_are_none(monkeypatch, flag):
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(ValueError, match="auto, cpu, cuda, cuda:N"):
        dist.pick_device(flag)


# ------------------------------------------------------------------------------------------------------- precision


def test_precision_by_device(monkeypatch):
    """bf16 where the GPU has it itself (emulation does not count), else fp16; fp32 on the CPU; the flag goes before."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    pretend_gpus(monkeypatch, 1, bf16=True)
    assert dist.pick_precision(None, gpu) == "bf16" and dist.pick_precision(None, cpu) == "fp32"
    pretend_gpus(monkeypatch, 1, bf16=False)
    assert dist.pick_precision(None, gpu) == "fp16"
    assert [dist.pick_precision(flag, cpu) for flag in dist.PRECISIONS] == ["fp32", "bf16", "fp16"]
    with pytest.raises(ValueError, match="precision 'fp8' is not one of fp32, bf16, fp16"):
        dist.pick_precision("fp8", gpu)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast(precision, dtype):
    layer = torch.nn.Linear(4, 4)
    with dist.autocast(torch.device("cpu"), precision):
        assert layer(torch.zeros(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_memory_and_waiting_on_the_cpu():
    dist.synchronize(torch.device("cpu"))
    assert 0.05 < dist.peak_memory_gib(torch.device("cpu")) < 1000  # GiB: a Python with torch is beyond 50 MiB


def start(store, processes: int):
    """What every rank gets when all ranks ask for the store of their start at once."""
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda index: dist.store_of_this_start(store, index, processes), range(processes)))


def test_a_store_that_outlives_its_processes():
    """One store under all starts, as torchrun keeps it; left in it are keys of ranks that died at any point of
    joining.
    """
    shared = torch.distributed.HashStore()
    for processes in (3, 3, 2, 4):
        for dead in range(1, 4):
            shared.set(f"asks/{dead}", f"dead{dead}")
        stores = start(shared, processes)
        stores[0].set("address", f"of {processes}")
        assert all(store.get("address") == f"of {processes}".encode() for store in stores)
        stores[0].delete_key("address")
    fresh = start(shared, 3)
    fresh[0].set("here", "1")
    assert fresh[2].check(["here"]) and not stores[1].check(["here"])


def test_ranks_that_never_come_are_named():
    store = torch.distributed.HashStore()
    store.set("asks/1", "died before its answer")
    with pytest.raises(RuntimeError, match="3 processes were started, but ranks 1, 2 did not join"):
        dist.store_of_this_start(store, 0, 3, datetime.timedelta(seconds=0.2))


def test_processes_that_read_different_files_all_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.check_same({"sha256": "a"}, "run.pth (--resume)")
    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, {"sha256": "b"}])
    with pytest.raises(ValueError, match=r"read different contents of run.pth \(--resume\): is it on a disk that all"):
        dist.check_same({"sha256": "a"}, "run.pth (--resume)")
