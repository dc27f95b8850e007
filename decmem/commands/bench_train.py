"""``decmem bench train``: how fast the world model learns on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decmem.commands.stages import stage_bars
from decmem.errors import UserError


@dataclass(frozen=True)
class BenchTrain:
    """Time a training step of the world model, on random latents.

    The clock covers forward and backward over all chunks of the clips, clean and noisy; not the
    optimiser, nor making the clips. Operations count real tokens, three times the forward pass.

    Example: decmem bench train --preset paper --device cuda --clips 1 --peak 989

    Writes train_DEVICE.json and prints the same.
    """

    preset: str = "pocket"
    """Which model."""

    memory: Literal["decoupled", "window", "dense"] = "decoupled"
    """Which memory it learns with."""

    clips: int | None = None
    """Clips a step; default the preset's batch."""

    latents: int | None = None
    """Latents of a clip; default the preset's."""

    chunk: int | None = None
    """Latents predicted together; default the preset's largest."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations; auto is bf16 on a GPU, fp32 on a CPU."""

    compile: bool | None = None
    """Compile the blocks; default as the preset trains, on a GPU."""

    recompute: bool | None = None
    """Compute blocks again on the way back; default as the preset trains."""

    peak: float | None = None
    """TFLOP/s of the device in that dtype (H100 and H200: 989), for the utilisation."""

    repeats: int = 5
    """The median of so many steps."""

    device: str = "auto"
    """auto, cpu or cuda."""

    out: Path = Path("out/bench")
    """Folder for the JSON file."""

    def run(self) -> None:
        """Measure, print, write."""
        import torch

        from decmem.bench.training import TrainBench
        from decmem.experiment import pick_device
        from decmem.machine import code_commit, describe_machine
        from decmem.presets import preset
        from decmem.storage import write_json

        for name in ("clips", "latents", "chunk", "repeats", "peak"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name}", f"got {value:g}, expected more than 0", "Raise it")
        experiment = preset(self.preset).with_memory(self.memory)
        training = experiment.memory_training
        device = pick_device(self.device)
        gpu = device.type == "cuda"
        latents = self.latents or training.latents
        chunk = self.chunk or max(experiment.model.chunk_sizes)
        if latents % chunk:
            cure = "Choose multiples, or another --chunk"
            raise UserError("--latents", f"{latents} latents are no whole chunks of {chunk}", cure)
        half = self.dtype == "bf16" or (self.dtype == "auto" and gpu)
        bench = TrainBench(
            experiment,
            device,
            torch.bfloat16 if half else torch.float32,
            self.clips or training.batch,
            latents,
            chunk,
            (training.compile and gpu) if self.compile is None else self.compile,
            training.recompute if self.recompute is None else self.recompute,
            self.peak,
            self.repeats,
        )
        with stage_bars(single=True) as watch:
            try:
                row = bench.row(watch)
            except torch.OutOfMemoryError as error:
                cure = "Ask for fewer --clips or --latents, or for --recompute"
                raise UserError("--clips", f"{device} has not the memory", cure) from error
        path = self.out / f"train_{device.type}.json"
        write_json(
            path,
            {
                "schema_version": 1,
                "theme": "train",
                "commit": code_commit(),
                "machine": describe_machine(device),
                "weights": "random",
                "repeats": self.repeats,
                "rows": [row],
            },
        )
        for name, value in row.items():
            print(f"{name:22} {value}")
        print(f"{path} holds the same and the machine.")
