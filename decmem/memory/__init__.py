"""The paper's subject: the bank, the decoupled memory, and its rivals on the same seam."""

from collections.abc import Callable
from typing import Literal

from decmem.memory.bank import Bank
from decmem.memory.base import Memory, MemoryConfig, Reading, Recall
from decmem.memory.decoupled import DecoupledMemory
from decmem.memory.kept_lists import KeptLists
from decmem.memory.layout import TokenLayout
from decmem.memory.lens import Lens
from decmem.memory.plan import Plan, Reach, bank_plan, joint_plan, training_plan
from decmem.memory.position import PositionConfig
from decmem.memory.windowed import WindowMemory

MemoryName = Literal["decoupled", "window", "dense"]

MEMORIES: dict[str, Callable[[MemoryConfig, PositionConfig, TokenLayout, int], Memory]] = {
    "decoupled": DecoupledMemory,
    "window": WindowMemory,
    "dense": WindowMemory,
}

__all__ = [
    "MEMORIES",
    "Bank",
    "DecoupledMemory",
    "KeptLists",
    "Lens",
    "Memory",
    "MemoryConfig",
    "MemoryName",
    "Plan",
    "PositionConfig",
    "Reach",
    "Reading",
    "Recall",
    "TokenLayout",
    "WindowMemory",
    "bank_plan",
    "joint_plan",
    "training_plan",
]
