"""``decmem bench``: how fast the parts are on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decmem.commands.stages import stage_bars
from decmem.errors import UserError


@dataclass(frozen=True)
class BenchRollout:
    """Time a chunk of a roll-out by the length of its history, with random weights.

    Decoupled memory stays level where dense attention grows: that is the paper's figure 1b. The
    clock covers all denoising steps and the write pass; with --codec the decoding too.

    Two GPUs take a branch of guidance each: torchrun --standalone --nproc-per-node 2 -m decmem
    bench rollout --guidance 7.5 ...

    Example: decmem bench rollout --preset pocket --device cpu --history 60 600 --out out/bench

    Writes rollout_DEVICE.json and prints the same as a table.
    """

    preset: str = "pocket"
    """Which model; its weights are random, speed does not depend on them."""

    history: tuple[int, ...] = (60, 200, 600)
    """Latents in the bank, four frames each."""

    memory: tuple[Literal["decoupled", "dense", "window"], ...] = ("decoupled", "dense")
    """Memories to compare."""

    steps: int | None = None
    """Denoising steps; default the preset's."""

    guidance: float | None = None
    """Strength of action guidance: a second branch in every step. Default none."""

    chunk: int | None = None
    """Latents generated together; default the preset's 4."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations; auto is bf16 on a GPU, fp32 on a CPU."""

    gemm: Literal["auto", "fp8"] = "auto"
    """Of the blocks' matrix products, in attention and feed-forward: auto is that of activations.
    fp8 rounds weights and activations to 8 bits, each row with a scale of its own: meant for GPUs
    that multiply such numbers faster (H100, H200), and another picture."""

    bank_dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Of stored keys and values; auto is that of the activations."""

    retrieve_until: int | None = None
    """Steps that retrieve; later ones reuse the lists of the last of them. Default every step."""

    share_lists: bool = False
    """The second branch of guidance reads the lists of the first."""

    random_lists: bool = False
    """More rows, with uniformly random lists: what caches can never help with."""

    graphs: Literal["auto", "eager", "off"] = "auto"
    """auto records denoising as CUDA graphs on a GPU; eager runs the same code unrecorded."""

    codec: bool = False
    """Decode to frames inside the clock; on a GPU beside the write pass, as sessions do."""

    repeats: int = 7
    """The median of so many chunks."""

    device: str = "auto"
    """auto, cpu or cuda."""

    out: Path = Path("out/bench")
    """Folder for the JSON file."""

    def run(self) -> None:
        """Measure, print, write."""
        import torch

        from decmem.bench.rollout import RolloutBench
        from decmem.distributed import join, leave
        from decmem.experiment import pick_device
        from decmem.guidance_pair import GuidancePair
        from decmem.machine import code_commit, describe_machine
        from decmem.memory.quantised import FP8
        from decmem.presets import preset
        from decmem.sampler import Running
        from decmem.storage import write_json

        for name, values in (("history", self.history), ("memory", self.memory)):
            if not values:
                raise UserError(f"--{name}", "none given", "Give one or more")
        if min(self.history) < 1:
            raise UserError("--history", f"got {min(self.history)}", "Give 1 latent or more")
        for name in ("steps", "chunk", "repeats", "retrieve_until"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(
                    f"--{name.replace('_', '-')}", f"got {value}, expected at least 1", "Raise it"
                )
        experiment, device = preset(self.preset), pick_device(self.device)
        gpu = device.type == "cuda"
        dtype = torch.bfloat16 if self.dtype == "bf16" or (self.dtype == "auto" and gpu) else None
        formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}
        place = join(device)
        try:
            pair = None if place.world == 1 else GuidancePair(place)
            if pair is not None:
                pair.require(self.guidance)
            bench = RolloutBench(
                experiment,
                place.device,
                dtype or torch.float32,
                self.history,
                self.memory,
                self.steps,
                self.guidance,
                self.chunk,
                self.codec,
                self.repeats,
                Running(
                    self.retrieve_until,
                    self.share_lists,
                    formats.get(self.bank_dtype),
                    graphs=self.graphs,
                    pair=pair,
                ),
                self.random_lists,
                FP8 if self.gemm == "fp8" else None,
            )
            with stage_bars(single=True) as watch:
                made = list(bench.rows(watch if place.first else None))
        finally:
            leave(place)
        if not any(row for row, _ in made):
            raise UserError("--history", made[0][1]["failure"], "Ask for less")
        if not place.first:
            return
        path = self.out / f"rollout_{device.type}.json"
        write_json(
            path,
            {
                "schema_version": 1,
                "theme": "rollout",
                "commit": code_commit(),
                "machine": describe_machine(place.device),
                "weights": "random",
                "repeats": self.repeats,
                "chunk": bench.latents,
                "rows": [row for row, _ in made if row],
                "seen": [seen for _, seen in made],
            },
        )
        print("| memory | history | retrieval | ms per chunk | frames/s | different blocks |")
        print("| --- | --- | --- | --- | --- | --- |")
        for row, also in made:
            if row is None:
                print(f"| {also['memory']} | {also['history']} | {also['failure']} | | | |")
                continue
            figures = f"{row['ms_per_chunk']:.1f} | {row['fps']:.2f}"
            blocks = also.get("distinct_blocks", {}).get("mean", "")
            told = f"{row['memory']} | {row['history']} | {row['retrieval'] or ''}"
            print(f"| {told} | {figures} | {blocks} |")
        print(f"{path} holds every figure and the machine.")
