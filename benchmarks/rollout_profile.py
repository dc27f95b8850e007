"""Where the time of a roll-out's chunk goes: the kernels of a chunk and its write pass, by time.

python benchmarks/rollout_profile.py [--history 206] [--steps 4] [--guidance 7.5] [--gemm fp8]
    [--retrieve-until 1] [--share-lists] [--preset paper] [--device cuda] [--rows 22]

Random weights and a random bank, as in `decmem bench rollout`; on a CPU operations instead of
kernels. Times are of the device, not of the clock on the wall.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from decmem.bench.history import random_bank, wandering
from decmem.bench.rollout import RolloutBench
from decmem.presets import preset
from decmem.sampler import Running


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--history", type=int, default=206, help="latents behind the chunk")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, help="both branches in one pass")
    parser.add_argument("--gemm", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--retrieve-until", type=int, help="steps that retrieve; default all")
    parser.add_argument("--share-lists", action="store_true", help="by the branches of guidance")
    parser.add_argument("--rows", type=int, default=22, help="kernels to show")
    asked = parser.parse_args()

    device = torch.device(asked.device)
    gpu = device.type == "cuda"
    bench = RolloutBench(
        preset(asked.preset), device, torch.bfloat16 if gpu else torch.float32, [asked.history],
        ["decoupled"], steps=asked.steps, guidance=asked.guidance,
        running=Running(retrieve_until=asked.retrieve_until, share_lists=asked.share_lists),
        gemm_dtype=torch.float8_e4m3fn if asked.gemm == "fp8" else None,
    )  # fmt: skip
    model = bench._model("decoupled")
    sampler = bench._sampler(model, asked.history, random=False)
    bank = random_bank(model, asked.history, bench.dtype, sampler.running.room)
    steering = wandering(model, asked.history, bench.latents)
    noise = sampler.noise([0], steering.time.tolist())

    def chunk() -> None:
        latents = sampler.generate(bank, steering, noise)
        sampler.write(bank, latents, steering)
        bank.truncate(asked.history)
        if gpu:
            torch.cuda.synchronize(device)

    for _ in range(3):
        chunk()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        chunk()
    spent = [
        ((x.device_time_total if gpu else x.self_cpu_time_total) / 1e3, x.count, x.key)
        for x in seen.key_averages()
    ]
    print(f"{sum(ms for ms, *_ in spent):.1f} ms")
    for ms, count, name in sorted(spent, reverse=True)[: asked.rows]:
        print(f"{ms:9.2f} ms {count:6d}  {name[:95]}")


if __name__ == "__main__":
    main()
