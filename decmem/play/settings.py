"""What a client may set between chunks, within what the model and the server allow."""

from dataclasses import dataclass, replace
from typing import Any

from decmem.errors import UserError
from decmem.play.studio import Studio
from decmem.rollout import Session


@dataclass(frozen=True)
class Settings:
    """The fields of a `settings` message."""

    global_memory: bool
    k: int
    steps: int
    guidance: float | None
    chunk: int
    layer: int | None = None
    lens: bool = False

    @classmethod
    def of(cls, studio: Studio) -> "Settings":
        """Those a new session starts with."""
        return cls._read(studio.session)

    @classmethod
    def _read(cls, session: Session) -> "Settings":
        trained = session.config.reading.retrieved
        return cls(
            session.global_memory,
            trained if session.retrieved is None else session.retrieved,
            session.steps,
            session.guidance,
            session.chunk,
        )

    def changed(self, wanted: dict[str, Any], studio: Studio) -> "Settings":
        """With what a `set` message asks for.

        Raises:
            UserError: for a value the model or the server does not allow.
        """
        fields = {name: value for name, value in wanted.items() if name != "type"}
        config, bounds = studio.session.config, studio.bounds
        for name, most in (("k", studio.max_k), ("steps", bounds.steps)):
            if fields.get(name, 1) > most:
                raise UserError(name, str(fields[name]), f"Give 1 to {most}")
        guidance = fields.get("guidance")
        if guidance is not None and not 0 <= guidance <= bounds.guidance:
            raise UserError("guidance", str(guidance), f"Give 0 to {bounds.guidance:g}, or null")
        if fields.get("chunk", config.chunk_sizes[0]) not in config.chunk_sizes:
            known = ", ".join(map(str, config.chunk_sizes))
            raise UserError("chunk", str(fields["chunk"]), f"Give one of {known}")
        layer = fields.get("layer")
        if layer is not None and layer >= config.layers:
            raise UserError("layer", str(layer), f"Give 0 to {config.layers - 1}, or null for all")
        return replace(self, **fields)

    def adopted(self, session: Session, studio: Studio) -> "Settings":
        """The session's own, as a saved world brings them, within bounds; the lens stays."""
        theirs, bounds = self._read(session), studio.bounds
        guidance = theirs.guidance
        return replace(
            theirs,
            global_memory=bool(theirs.global_memory),
            k=min(theirs.k, studio.max_k),
            steps=min(theirs.steps, bounds.steps),
            guidance=None if guidance is None else min(max(guidance, 0), bounds.guidance),
            layer=self.layer,
            lens=self.lens,
        )

    def apply(self, session: Session) -> None:
        """Sets up a session; what this leaves open stays as trained."""
        session.global_memory = self.global_memory
        session.retrieved = self.k
        session.steps = self.steps
        session.guidance = self.guidance
        session.chunk = self.chunk
        session.lens = self.lens

    def told(self) -> dict[str, Any]:
        """As a message's fields."""
        return dict(vars(self))
