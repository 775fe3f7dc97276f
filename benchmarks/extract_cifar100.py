"""Extract the token stores of the CIFAR-100 experiment, measuring rate, size and memory on the way.

    python benchmarks/extract_cifar100.py --images DIR --out DIR [--vit-weights FILE] [--stores NAME ...]
    python benchmarks/extract_cifar100.py --images DIR --out DIR --memory

``DIR`` of the images has ``train/CLASS/*.png`` and ``test/CLASS/*.png``. Run it again after any interruption:
it continues. Segments of extraction alternate with segments of the bare backbone (the model as timm gives it, on
batches that lie ready in memory, nothing loaded or written), so that a busy machine slows both alike, once as one
batch a core, as extraction does, and once as one batch over all cores. Extraction keeps freed memory in the
process, which speeds these up as well; so ``plain`` is the better of the two ways in a fresh process without,
what a loop over the backbone would reach. Every finished store writes a row of results/extract_cifar100.csv.

``--memory`` extracts 1x, 4x and 16x the images, streams through each store, and writes the largest memory of both to
results/extract_memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import convexhead
from convexhead.tokens import Backbone, ImageSource, TokenStore, extract, open_backbone, open_source
from convexhead.tokens.backbones import timm_backbone
from convexhead.tokens.job import ExtractionJob, Task
from convexhead.tokens.parallel import map_on_cores
from convexhead.tokens.progress import ProgressMeter
from convexhead.tokens.store.manifest import Manifest

RESULTS = Path(__file__).parent / "results"
LITE0 = "packaged:efficientnet-lite0"
VIT = "timm:vit_small_patch14_dinov2@"
# Objects fill CIFAR images to the margin: nothing is cropped.
STORES: dict[str, tuple[str, dict[str, Any]]] = {
    "lite0-final": (LITE0, {"crop_pct": 1.0, "channels": 100}),  # 224 px: 7 x 7 x 1280 -> 100
    "lite0-block4": (LITE0, {"crop_pct": 1.0, "layer": 4}),  # 224 px: 14 x 14 x 112
    "vit-s14": (VIT, {"image_size": 112}),  # 8 x 8 x 384 and a class token
}
SEGMENT_SHARDS = 8
# Of the time of the segment of extraction before it: one batch a core, one over all cores.
BARE_SHARES = (0.08, 0.04)
MEMORY_OPTIONS = {"layer": 4, "image_size": 112, "shard_size": 128}


class Limited:
    """A source with ``n`` evenly spaced train images, in order, and a fifth as many of every other split."""

    def __init__(self, source: ImageSource, n: int) -> None:
        self.spec = f"{source.spec} ({n} train images)"
        self.splits, self.class_names, self._source = source.splits, source.class_names, source
        self._rows, self._files = {}, {}
        for split in source.splits:
            files = source.files(split)
            wanted = min(n if split == "train" else n // 5, len(files))
            self._rows[split] = np.linspace(0, len(files), wanted, endpoint=False, dtype=int)
            self._files[split] = [files[row] for row in self._rows[split]]

    def labels(self, split: str) -> Any:
        return self._source.labels(split)[self._rows[split]]

    def files(self, split: str) -> list[str]:
        return self._files[split]

    def load(self, split: str, index: int) -> Any:
        return self._source.load(split, int(self._rows[split][index]))

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}/{[len(rows) for rows in self._rows.values()]}"


class Stopwatch:
    """Writes shards in segments, each followed by bare forward passes; one line of ``log`` a segment."""

    def __init__(self, log: Path, bare_backbone: Backbone) -> None:
        self.log, self.backbone = log, bare_backbone
        self._write = ExtractionJob.write
        self.batches: list[torch.Tensor] = []

    def write(self, job: ExtractionJob, tasks: list[Task], manifest: Manifest, meter: ProgressMeter) -> None:
        """Stand in for `ExtractionJob.write`."""
        backbone, source = self.backbone, job.extractor.source
        rows = np.linspace(0, len(source.labels("train")), 8 * job.batch_size, endpoint=False, dtype=int)
        ready = torch.stack([backbone.prepare(source.load("train", int(row))) for row in rows])
        self.batches = list(ready.split(job.batch_size))
        with torch.inference_mode():
            backbone(self.batches[0])
        for start in range(0, len(tasks), SEGMENT_SHARDS):
            segment = tasks[start : start + SEGMENT_SHARDS]
            wall, cpu = time.perf_counter(), time.process_time()
            self._write(job, segment, manifest, meter)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            a_core, a_core_cpu = self.bare(batch_a_core, backbone, BARE_SHARES[0] * wall)
            over_cores, _ = self.bare(batch_over_cores, backbone, BARE_SHARES[1] * wall)
            images = sum(len(task.items) for task in segment)
            row = (images, wall, cpu / images, a_core, a_core_cpu, over_cores)
            with open(self.log, "a") as file:
                file.write(",".join(f"{value:.6g}" for value in row) + "\n")
            bare = f"bare {a_core:.1f} or {over_cores:.1f}"
            print(f"{self.log.stem}: {images / wall:.1f} images/s, {bare}", flush=True)

    def bare(self, way: Callable[..., Iterator[Any]], backbone: Any, seconds: float) -> tuple[float, float]:
        """Return images a second and CPU seconds an image of forward passes alone, over at least ``seconds``."""
        start, cpu, n = time.perf_counter(), time.process_time(), 0
        pace = len(self.batches[0])
        while (spent := time.perf_counter() - start) < seconds or n == 0:
            # Whole rounds of a pool: its start and end are shared by enough batches.
            want = max(8, int((seconds - spent) * n / max(spent, 1e-9) / pace))
            for _ in way(backbone, itertools.islice(itertools.cycle(self.batches), want)):
                n += pace
        return n / (time.perf_counter() - start), (time.process_time() - cpu) / n

    def summary(self) -> dict[str, Any]:
        """Return the totals over all segments, also those of earlier runs.

        ``ratio_...`` is of rates; ``cpu_ratio`` of CPU seconds an image, which other processes disturb less.
        """
        images, seconds, cpu, *bare = np.loadtxt(self.log, delimiter=",", ndmin=2).T
        # Segments weigh as much as the extraction beside them.
        a_core, over_cores = (float(images.sum() / (images / rate).sum()) for rate in (bare[0], bare[2]))
        rate = float(images.sum() / seconds.sum())
        cpu_ms, bare_cpu_ms = (float(1000 * (images * each).sum() / images.sum()) for each in (cpu, bare[1]))
        return {
            "images": int(images.sum()),
            "extract_images_per_s": round(rate, 2),
            "bare_a_core_images_per_s": round(a_core, 2),
            "ratio_to_bare_a_core": round(rate / a_core, 3),
            "bare_over_cores_images_per_s": round(over_cores, 2),
            "ratio_to_bare_over_cores": round(rate / over_cores, 3),
            "cpu_ms_per_image": round(cpu_ms, 2),
            "bare_cpu_ms_per_image": round(bare_cpu_ms, 2),
            "cpu_ratio": round(bare_cpu_ms / cpu_ms, 3),
            "segments": len(images),
        }


def open_bare(spec: str, options: dict[str, Any]) -> Backbone:
    """Open the backbone of a store as its library gives it, without what extraction does to make it faster."""
    with mock.patch.object(timm_backbone, "fold_batch_norm", lambda model: model):
        return open_backbone(spec, **{key: value for key, value in options.items() if key != "channels"})


def batch_a_core(backbone: Any, batches: Iterator[torch.Tensor]) -> Iterator[Any]:
    def forward(batch: torch.Tensor) -> None:
        with torch.inference_mode():
            backbone(batch)

    return map_on_cores(forward, batches)


def batch_over_cores(backbone: Any, batches: Iterator[torch.Tensor]) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        for batch in batches:
            with torch.inference_mode():
                yield backbone(batch)
    finally:
        torch.set_num_threads(threads)


def _measured(job: ExtractionJob, stopwatch: Stopwatch, *arguments: Any) -> None:
    stopwatch.write(job, *arguments)


def run_store(name: str, args: argparse.Namespace) -> None:
    """Extract one store in this process and write its row."""
    spec, options = STORES[name]
    spec += str(args.vit_weights) if spec == VIT else ""
    source = open_source(args.images)
    source = Limited(source, args.limit) if args.limit else source
    args.out.mkdir(parents=True, exist_ok=True)
    stopwatch = Stopwatch(args.out / f"{name}.segments", open_bare(spec, options))
    start = time.perf_counter()
    with mock.patch.object(ExtractionJob, "write", partialmethod(_measured, stopwatch)):
        store = extract(source, spec, args.out / name, dtype=args.dtype, **options)
    info = store.info()
    row = {"store": name, "backbone": spec.partition("@")[0], "layer": info["layer"]}
    row["tokens"] = f"{info['grid'][0]}x{info['grid'][1]}x{info['stored_channels']}"
    if stopwatch.log.exists():
        row |= {"prefix_tokens": info["prefix_tokens"], "dtype": info["dtype"], **stopwatch.summary()}
        plain = float(again(args, "--bare-one", name, capture=True).split()[-1])
        row |= {"plain_images_per_s": plain, "ratio_to_plain": round(row["extract_images_per_s"] / plain, 3)}
        row |= {"store_MB": round(info["bytes"] / 1e6, 1), "peak_MB": peak_megabytes()}
        row |= {"last_run_s": round(time.perf_counter() - start, 1)}
        write_row(args.csv or RESULTS / "extract_cifar100.csv", row, key=("store", "images"))


def run_bare(name: str, args: argparse.Namespace, seconds: float = 10.0) -> None:
    """Print the better rate of forward passes alone in this process, which has done nothing else."""
    spec, options = STORES[name]
    spec += str(args.vit_weights) if spec == VIT else ""
    backbone = open_bare(spec, options)
    source = open_source(args.images)
    stopwatch = Stopwatch(Path(), backbone)
    ready = torch.stack([backbone.prepare(source.load("train", i)) for i in range(64)])
    stopwatch.batches = list(ready.split(8))
    print(max(round(stopwatch.bare(way, backbone, seconds)[0], 2) for way in (batch_a_core, batch_over_cores)))


def run_memory(n: int, what: str, args: argparse.Namespace) -> None:
    """Extract or stream ``n`` train and ``n / 5`` test images in this process and print the peak."""
    folder = args.out / f"memory-{n}"
    if what == "extract":
        extract(Limited(open_source(args.images), n), LITE0, folder, **MEMORY_OPTIONS)  # type: ignore[arg-type]
    else:
        for split in (store := TokenStore.open(folder)).splits:
            for chunk in store[split].chunks():
                chunk.sum()
    print(peak_megabytes())


def memory_rows(args: argparse.Namespace) -> None:
    """Measure 1x, 4x and 16x the images, each in a process of its own."""
    for n in (args.memory_base * factor for factor in (1, 4, 16)):
        row: dict[str, Any] = {"train_images": n, "backbone": LITE0, **MEMORY_OPTIONS}
        for what in ("extract", "stream"):
            out = again(args, "--memory-one", f"{n}:{what}", capture=True)
            row[f"{what}_peak_MB"] = float(out.split()[-1])
        row["store_MB"] = round(TokenStore.open(args.out / f"memory-{n}").info()["bytes"] / 1e6, 1)
        write_row(args.csv or RESULTS / "extract_memory.csv", row, key=("train_images",))


def again(args: argparse.Namespace, *more: str, capture: bool = False) -> str:
    """Run this script in a fresh process with other arguments added."""
    command = [sys.executable, __file__, *args.given, *more]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None).stdout or ""


def peak_megabytes() -> float:
    """Return the largest resident set of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)


def write_row(path: Path, row: dict[str, Any], key: tuple[str, ...]) -> None:
    """Add a row with hardware and versions to a CSV file, in place of one with the same key."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    row |= {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
    }
    row |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}
    row |= {"torch": torch.__version__, "timm": version("timm"), "convexhead": convexhead.__version__}
    row |= {"date": time.strftime("%Y-%m-%d")}
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [old for old in rows if any(old[k] != str(row[k]) for k in key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the stores")
    parser.add_argument("--vit-weights", type=Path, help="safetensors file of a timm vit_small_patch14_dinov2")
    parser.add_argument("--stores", nargs="+", choices=STORES, help="default: all, the ViT only with --vit-weights")
    parser.add_argument("--limit", type=int, help="train images, for a trial; a fifth as many of test")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--csv", type=Path, help="file for the rows, default benchmarks/results/...")
    parser.add_argument(
        "--memory", action="store_true", help="measure the largest memory at 1x, 4x and 16x the images instead"
    )
    parser.add_argument("--memory-base", type=int, default=500, help="train images at 1x")
    parser.add_argument("--store-one", help=argparse.SUPPRESS)
    parser.add_argument("--bare-one", help=argparse.SUPPRESS)
    parser.add_argument("--memory-one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.given = sys.argv[1:]
    if args.bare_one:
        run_bare(args.bare_one, args)
    elif args.store_one:
        run_store(args.store_one, args)
    elif args.memory_one:
        n, _, what = args.memory_one.partition(":")
        run_memory(int(n), what, args)
    elif args.memory:
        memory_rows(args)
    else:
        stores = args.stores or [name for name in STORES if name != "vit-s14" or args.vit_weights]
        if "vit-s14" in stores and not args.vit_weights:
            parser.error("the store vit-s14 needs --vit-weights FILE")
        for name in stores:
            again(args, "--store-one", name)


if __name__ == "__main__":
    main()
