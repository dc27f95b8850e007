"""What the worlds of a server hold: as each of them states it, and counted tensor by tensor."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from decmem.memory import Bank
from decmem.memory.stable import Stable
from decmem.rollout import Session


def ledger(
    worlds: Sequence[Session], device: torch.device, stable: Stable | None = None
) -> dict[str, int | None]:
    """Bytes of all worlds together; called where model work is done, so that nothing moves.

    `stated_bytes` is the sum of what the worlds' banks say of themselves (`memory_bytes` of a
    chunk), `arena_bytes` the size of the storage behind all they store, each counted once: they
    differ only if a bank says something wrong. Of a `stable` that worlds share, that is their
    stalls; `stable_bytes` is all of it, `vacant_bytes` what no world has. `written_bytes` is the
    part of `arena_bytes` that holds history, `past_bytes` what latents, actions and poses take
    besides. `gpu_bytes` and `gpu_reserved_bytes` are PyTorch's own figures of the device, None on
    a CPU.
    """
    banks = [world.history.bank for world in worlds if world.history.bank is not None]
    shared = [] if stable is None else list(_arenas([stable.whole]))
    whole = {arena.untyped_storage().data_ptr() for arena in shared}
    stalled, own = [], []
    for arena in _arenas(banks):
        (stalled if arena.untyped_storage().data_ptr() in whole else own).append(arena)
    stalls, stable_bytes = _parts(stalled), _storage(shared)
    past = (
        tensor
        for world in worlds
        if world.latents is not None and world.conditions is not None
        for tensor in (world.latents, *vars(world.conditions).values())
    )
    gpu = device.type == "cuda"
    return {
        "worlds": len(worlds),
        "latents": sum(world.length for world in worlds),
        "stated_bytes": sum(bank.allocated_bytes for bank in banks),
        "arena_bytes": _storage(own) + stalls,
        "stable_bytes": stable_bytes,
        "vacant_bytes": stable_bytes - stalls,
        "written_bytes": sum(bank.length * bank.bytes_per_latent for bank in banks),
        "past_bytes": _storage(past),
        "gpu_bytes": torch.cuda.memory_allocated(device) if gpu else None,
        "gpu_reserved_bytes": torch.cuda.memory_reserved(device) if gpu else None,
    }


def _arenas(banks: Sequence[Bank]) -> Iterator[Tensor]:
    return (arena for bank in banks for layer in bank.layers for _, arena in layer.arenas())


def _parts(stalls: Iterable[Tensor]) -> int:
    """Bytes of parts of storages, counted once where two are the same part."""
    return sum({arena.data_ptr(): arena.nbytes for arena in stalls}.values())


def _storage(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, counted once where they share them."""
    parts = [tensor.untyped_storage() for tensor in tensors]
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())
