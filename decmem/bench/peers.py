"""Block-sparse attention of other libraries, where they are installed."""

import importlib
from typing import NamedTuple


class Peer(NamedTuple):
    """A library that computes the same, the module to import, and what it is."""

    name: str
    module: str
    package: str
    note: str


PEERS = (
    Peer("fa4", "flash_attn.cute", "flash-attn-4", "block-sparse attention in CuTe"),
    Peer("cudnn_bsa", "cudnn.block_sparse_attention", "nvidia-cudnn-frontend", "BSA in CuTe"),
    Peer("vsa", "fastvideo_kernel", "fastvideo-kernel", "video sparse attention"),
    Peer("flashinfer", "flashinfer", "flashinfer-python", "variable block-sparse attention"),
)


def obstacle(peer: Peer) -> str | None:
    """Why the library cannot be used here; None if it can be imported."""
    try:
        importlib.import_module(peer.module)
    except Exception as failure:
        # A library built for another CUDA or PyTorch fails in ways of its own.
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return None


def absent_peers() -> list[dict[str, str]]:
    """The libraries that are not compared here, with the reason."""
    found = []
    for peer in PEERS:
        reason = obstacle(peer)
        if reason is not None:
            found.append({"peer": peer.package, "reason": reason})
    return found
