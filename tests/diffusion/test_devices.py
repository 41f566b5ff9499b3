"""Accelerators are found by torch's own interface, and what one of them cannot do is said; there is none here."""

from types import SimpleNamespace

import pytest
import torch

from stepdistill import doctor
from stepdistill.diffusion import devices
from stepdistill.training.distributed import LAUNCHED, process_count


@pytest.fixture
def found(monkeypatch):
    """Has torch find two accelerators of a kind, with or without float64."""

    def find(kind: str, float64: bool = True) -> None:
        for name in LAUNCHED:
            monkeypatch.delenv(name, raising=False)
        facts = SimpleNamespace(name=f"a {kind}", total_memory=48 * 2**30, has_fp64=float64)
        module = SimpleNamespace(
            get_device_properties=lambda index: facts,
            is_bf16_supported=lambda: True,
            empty_cache=lambda: find.emptied.append(kind),
        )
        monkeypatch.setattr(doctor, "_has_driver", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: facts)

    find.emptied = []
    return find


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_is_used_whatever_its_kind(kind, found):
    found(kind)
    assert devices.best_device() == torch.device(kind)
    assert devices.device_count() == process_count(None) == 2
    devices.empty_cache()
    assert found.emptied == [kind]
    rows = {row.name: row for row in doctor._devices()}
    assert rows[f"{kind}:1"].ok and rows[f"{kind}:1"].found.startswith(f"a {kind}, 48 GiB, ")
    assert ("cuda-graphs" in rows[f"{kind}:0"].advice) == (kind == "xpu")


def test_rocm_is_named(found, monkeypatch):
    found("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm 6.4, bf16" in doctor._devices()[1].found


@pytest.mark.parametrize(("kind", "float64"), [("mps", True), ("xpu", False)])
def test_one_without_float64_is_named_and_left_alone(kind, float64, found):
    found(kind, float64)
    assert devices.on_cpu() and devices.best_device() == torch.device("cpu")
    assert devices.device_count() == 0 and process_count(None) == 1
    devices.empty_cache()
    assert found.emptied == []
    row = doctor._devices()[1]
    assert (row.name, row.ok) == (f"{kind}:0", False) and "float64" in row.advice


def test_a_machine_without_one_is_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.best_device() == torch.device("cpu") and devices.device_count() == 0
    assert devices.torch_of("cpu") is torch
    assert doctor._devices()[1].name == "accelerator"
