"""What the block world promises never to change without a new version."""

WORLD_VERSION = "blockworld/2"

HELD_OUT_SEED_BASE = 10_000_000
"""Worlds and walks with seeds from here on are for evaluation; training uses those below."""

FPS = 10
"""Frames, and so actions, per second."""
