"""Where tensors are computed: the device asked for, and what it can do."""

from __future__ import annotations

import torch

from speciesmap.errors import ConfigError


def choose_device(name: str | None) -> torch.device:
    """Take the device asked for, else a GPU where there is one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"there is no device {name!r} here ({reason}); try cpu") from error
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a processor has instructions for bfloat16, not an emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
