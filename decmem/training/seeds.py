"""Randomness of training: every draw derives from (seed, rank, step), so resuming is exact."""

import torch


def mix(*parts: int) -> int:
    """One 63-bit seed from several numbers (splitmix64 over them)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63


def host_generator(*parts: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(mix(*parts))


def device_generator(*parts_and_device: int | torch.device) -> torch.Generator:
    """A generator on the device given last."""
    *parts, device = parts_and_device
    assert isinstance(device, torch.device)
    numbers = [p for p in parts if isinstance(p, int)]
    return torch.Generator(device).manual_seed(mix(*numbers))
