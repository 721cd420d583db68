import logging

import pytest
import torch

from backends import device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        ({"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": False}, torch.bfloat16),
        ({"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, torch.bfloat16),
        ({"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False}, torch.float32),
    ],
)
def test_auto_is_what_the_processor_multiplies(monkeypatch, probes, expected):
    for name, answer in probes.items():
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
    assert device.compute_dtype("auto", CPU) is expected
    assert device.compute_dtype("float32", CPU) is torch.float32
    assert device.compute_dtype("float16", CPU) is torch.float16


@pytest.mark.parametrize(
    ("option", "dtype", "hardware", "expected"),
    [
        ("auto", "auto", torch.float32, "float16"),
        ("auto", "auto", torch.bfloat16, "none"),
        ("auto", "float32", torch.float32, "none"),
        ("auto", "bfloat16", torch.float32, "none"),
        ("none", "auto", torch.float32, "none"),
        ("int8", "auto", torch.bfloat16, "int8"),
    ],
)
def test_weights_are_in_float16_where_nobody_says_otherwise(monkeypatch, option, dtype, hardware, expected):
    monkeypatch.setattr(device, "_has_bfloat16", lambda device: hardware is torch.bfloat16)
    monkeypatch.setattr(device, "has_half_products", lambda: True)
    assert device.weight_format(option, dtype, CPU) == expected
    gpu = torch.device("cuda:0")
    assert device.weight_format(option, dtype, gpu) == (option if option != "auto" else "none")
    monkeypatch.setattr(device, "has_half_products", lambda: False)
    assert device.weight_format("auto", dtype, CPU) == "none"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_auto_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.compute_dtype("auto", torch.device("cuda:0")) is expected


def test_without_cuda_a_gpu_s_instance_runs_on_the_cpu_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert device.place("cuda:1") == CPU
    assert "has no CUDA: running on the CPU" in caplog.text
    assert device.place("cpu") == CPU


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_there_is_no_memory(error, is_one):
    assert device.is_out_of_memory(error) is is_one


def test_what_torch_says_itself_of_no_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.is_out_of_memory(caught.value)
