"""The world model and its parts."""

from decmem.model.conditioning import Conditions
from decmem.model.initialisation import initialise
from decmem.model.world_model import Context, ModelConfig, WorldModel

__all__ = ["Conditions", "Context", "ModelConfig", "WorldModel", "initialise"]
