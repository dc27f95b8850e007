"""How the C library keeps memory between uses."""

import ctypes
import os

# Of mallopt(3): the least that is given back from the top of the heap, and the least that is
# mapped by itself.
_TRIM, _MAP = -1, -3


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for what comes next, up to pieces of 32 MiB.

    Left alone, glibc may hand a layer's activations back to the system after use, and every page
    comes back zeroed on its first touch: up to 20,000 faults a chunk, by chance of the heap's
    layout. True where the C library takes the advice (glibc); elsewhere nothing changes. For the
    whole process, so for commands; what was once used stays resident.
    """
    advise = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if advise is None:
        return False
    return all([advise(option, size) for option, size in ((_TRIM, 2**30), (_MAP, 2**25))])
