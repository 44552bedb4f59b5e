"""Everything that can only be known on a GPU, in one call and one table.

    python -m benchmarks.gpu_check [--json FILE] [--check] [--only SECTION ...]

Sections: `tests` (those marked gpu), `pairwise` (results; time against the streamed traffic at the copy bandwidth
measured here, against the unfold form and torch.compile of the reference; in a CUDA graph), `energy` (results, time
against unfold and streamed torch), `step` (a training step with the Gated CRF loss at stride 4), `network` (torch eager
and compiled, share of the matmul peak measured here, images a second with upload of bytes and download of masks) and
`runtimes` (ONNX Runtime's CUDA provider and TensorRT, where they are installed). A section that fails says so in a row
and the next one goes on. Times are of CUDA events, the median of repeats after a warm-up.

`--device cpu` runs the same code at a tiny size without a GPU and without goals: a test of this program, not a figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import energy as energy_benchmark
from benchmarks.pairwise import unfold_refine
from training.losses import Kernel, gated_crf_loss
from training.methods import build_method
from training.methods.settings import GatedCRFSettings, PartialCESettings
from training.optimiser import build_optimizer
from training.recipe import Optimisation
from wsss_deploy import Segmenter
from wsss_deploy.artifact import save_model
from wsss_deploy.card import Architecture, ModelCard, Sizing
from wsss_deploy.environment import describe_environment
from wsss_deploy.networks import DeployedNetwork, build_network, encoder_preprocessing
from wsss_deploy.pairwise import PairwiseParameters, cuda_form, reference, refine

PARAMETERS = PairwiseParameters()
# Times of the streamed traffic at copy bandwidth; part of a step that the loss may add.
GOAL_TRAFFIC, GOAL_STEP = 2.0, 0.05
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}


@dataclass
class Row:
    """One line of the table; `ok` is None where there is no goal."""

    section: str
    name: str
    value: str
    goal: str = ""
    ok: bool | None = None


class Machine:
    """Where it runs, how large the problems are, and how time is taken.

    Args:
        device: A CUDA device, or the CPU for a dry run.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        # torch makes no device without a number the current one.
        self.device = torch.device("cuda", device.index or 0) if self.gpu else device
        if self.gpu:
            torch.cuda.set_device(self.device)  # events, streams and memory are those of the current device
        self.side = 512 if self.gpu else 32
        self.repeats = 20 if self.gpu else 1
        self.copy_bandwidth = self._copy_bandwidth()

    def milliseconds(self, run: Callable[[], Any], repeats: int | None = None) -> float:
        """Median time of a call that leaves its work on the current stream."""
        for _ in range(3 if self.gpu else 1):
            run()
        times = []
        for _ in range(repeats or self.repeats):
            if self.gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                started = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    def peak_mb(self, run: Callable[[], Any]) -> float:
        """Memory that a call takes beyond what is there before it."""
        if not self.gpu:
            return float("nan")
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def _copy_bandwidth(self) -> float:
        """Bytes a second, reads and writes together."""
        source = torch.ones(2**28 if self.gpu else 2**16, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (self.milliseconds(lambda: target.copy_(source)) / 1e3)


def gpu_tests(machine: Machine) -> Iterator[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    # Status 5 is "no tests": without a GPU they are skipped, which is status 0.
    yield Row("tests", "pytest -m gpu", last, "all pass", done.returncode == 0 and " passed" in last)


def pairwise_rows(machine: Machine) -> Iterator[Row]:
    """The refinement: affinity and ten steps."""
    generator = torch.Generator().manual_seed(0)

    def problem(side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        masks = torch.rand(1, 21, side, side, generator=generator).softmax(dim=1)
        guide = F.interpolate(torch.rand(1, 3, side // 8, side // 8, generator=generator), size=(side, side))
        return masks.to(machine.device, dtype), guide.to(machine.device, dtype)

    def ours(masks: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        return refine(masks, guide, PARAMETERS, form="cuda" if machine.gpu else "auto")

    for dtype, tolerance in TOLERANCE.items():
        if not machine.gpu and dtype == torch.float16:
            continue
        masks, guide = problem(machine.side // 4, dtype)
        expected = reference.refine(masks.double().cpu(), guide.double().cpu(), PARAMETERS)
        difference = float((ours(masks, guide).double().cpu() - expected).abs().max())
        good = difference <= tolerance
        yield Row("pairwise", f"difference from float64, {dtype}", f"{difference:.1e}", f"<= {tolerance}", good)
    side, steps = machine.side, PARAMETERS.iterations
    values = side * side * (steps * (2 * 21 + len(PARAMETERS.offsets)) + 3 + len(PARAMETERS.offsets))
    for dtype in (torch.float32, torch.float16) if machine.gpu else (torch.float32,):
        masks, guide = problem(side, dtype)
        least = 1e3 * values * masks.element_size() / machine.copy_bandwidth
        taken = machine.milliseconds(lambda m=masks, g=guide: ours(m, g))
        ratio, goal = taken / least, GOAL_TRAFFIC if dtype == torch.float32 else None
        text = f"{taken:.3f} ms, {ratio:.2f} x the traffic's {least:.3f} ms, "
        text += f"{machine.peak_mb(lambda m=masks, g=guide: ours(m, g)):.0f} MB"
        yield Row("pairwise", f"ours, {dtype}", text, f"<= {goal} x" if goal else "", ratio <= goal if goal else None)
    masks, guide = problem(side, torch.float32)
    if machine.gpu:
        out = torch.empty_like(masks)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            cuda_form.refine(PARAMETERS, masks, guide, None, out)
        taken = machine.milliseconds(graph.replay)
        difference = float((out - ours(masks, guide)).abs().max())
        text = f"{taken:.3f} ms, {difference:.1e} from the same without"
        yield Row("pairwise", "ours, in a CUDA graph", text, "<= 1e-6", difference <= 1e-6)
    plain = {
        "reference, torch": lambda: reference.refine(masks, guide, PARAMETERS),
        "unfold form, torch": lambda: unfold_refine(masks, guide, PARAMETERS),
    }
    if machine.gpu:
        compiled = torch.compile(lambda m, g: reference.refine(m, g, PARAMETERS))
        plain["torch.compile of the reference"] = lambda: compiled(masks, guide)
    for name, run in plain.items():
        yield Row("pairwise", name, f"{machine.milliseconds(run, 5):.3f} ms, {machine.peak_mb(run):.0f} MB")


def energy_rows(machine: Machine) -> Iterator[Row]:
    """The Gated CRF loss, forward and backward."""
    kernel = Kernel(1.0, {"xy": energy_benchmark.SIGMA_XY, "rgb": energy_benchmark.SIGMA_RGB})

    def loss_of(form: str) -> Callable[..., torch.Tensor]:
        return lambda p, image, mask: gated_crf_loss(
            p, [kernel], {"rgb": image}, energy_benchmark.RADIUS, mask_src=mask, form=form
        )

    forms: dict[str, Callable[..., torch.Tensor]] = {"streamed, torch": loss_of("torch")}
    forms = {"ours": loss_of("cuda" if machine.gpu else "auto")} | forms | {"unfold": energy_benchmark.unfold_loss}
    for side in (128, 512) if machine.gpu else (32,):
        found: dict[str, tuple[float, torch.Tensor]] = {}
        for name, loss in forms.items():
            p, image, mask = (tensor.to(machine.device) for tensor in energy_benchmark.problem(side))
            p.requires_grad_()

            def run(p=p, image=image, mask=mask, loss=loss) -> float:
                p.grad = None
                value = loss(p, image, mask)
                value.backward()
                return value.detach()

            value = float(run())
            text = f"{machine.milliseconds(run, 5):.3f} ms, {machine.peak_mb(run):.0f} MB"
            yield Row("energy", f"{name}, {side}x{side}", text)
            found[name] = value, p.grad
        ours, unfold = found["ours"], found["unfold"]
        parts = [abs(ours[0] - unfold[0]) / abs(unfold[0]), float((ours[1] - unfold[1]).norm() / unfold[1].norm())]
        difference = float(torch.tensor(parts).max())  # NaN if one of them is
        yield Row(
            "energy", f"difference from unfold, {side}x{side}", f"{difference:.1e}", "<= 1e-4", difference <= 1e-4
        )


def step_rows(machine: Machine) -> Iterator[Row]:
    """A training step with and without the Gated CRF loss."""
    side = 256 if machine.gpu else 32
    for encoder in ("vit_tiny_patch16_224", "vit_base_patch16_224") if machine.gpu else ("test_vit",):
        torch.manual_seed(0)
        network = build_network(Architecture(encoder=encoder), 21, weights="none").train().to(machine.device)
        preprocessing = encoder_preprocessing(encoder, {})
        optimiser = build_optimizer(network.encoder, [network.decoder], Optimisation())
        batch = energy_benchmark.sparse_batch(side, machine.device)
        times = {}
        for name, settings in (("without", PartialCESettings()), ("with", GatedCRFSettings(stride=4, start=0.0))):
            method = build_method(settings, 21, preprocessing).to(machine.device)

            def step(method=method, network=network, optimiser=optimiser, batch=batch) -> None:
                with torch.autocast(machine.device.type, torch.bfloat16):
                    losses = method(network, batch, 0.5)
                optimiser.zero_grad(set_to_none=True)
                sum(losses.values()).backward()
                optimiser.step()

            times[name] = machine.milliseconds(step)
        added = times["with"] / times["without"] - 1
        text = f"{times['without']:.2f} ms without, {times['with']:.2f} ms with, {added:+.1%}"
        goal = f"<= +{GOAL_STEP:.0%}"
        yield Row("step", f"{encoder}, 8 x {side} px, bf16, stride 4", text, goal, added <= GOAL_STEP)


def matmul_peak(machine: Machine, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if machine.gpu else 64
    a, b = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
    return 2 * side**3 / (machine.milliseconds(lambda: a @ b) / 1e3)


def network_rows(machine: Machine) -> Iterator[Row]:
    """Whole predictions in torch: bytes in, class ids out."""
    from torch.utils.flop_counter import FlopCounterMode

    dtype = torch.float16 if machine.gpu else torch.bfloat16
    peak = matmul_peak(machine, dtype)
    yield Row("network", f"matmul peak, {dtype}", f"{peak / 1e12:.1f} TFLOP/s")
    for encoder in ("vit_tiny_patch16_224", "vit_base_patch16_224") if machine.gpu else ("test_vit",):
        network = build_network(Architecture(encoder=encoder), 21, weights="none").eval()
        deployed = DeployedNetwork(network, encoder_preprocessing(encoder, {})).to(machine.device)
        forms = {"eager": deployed}
        if machine.gpu:
            forms["torch.compile"] = torch.compile(deployed, dynamic=False)
        for batch in (1, 8, 32) if machine.gpu else (1,):
            given = torch.randint(256, (batch, machine.side, machine.side, 3), dtype=torch.uint8)
            given = given.pin_memory() if machine.gpu else given
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                deployed(given.to(machine.device))
            for name, form in forms.items():

                def whole(form=form, given=given) -> torch.Tensor:
                    with torch.no_grad(), torch.autocast(machine.device.type, dtype):
                        return form(given.to(machine.device, non_blocking=True))[1].cpu()

                taken = machine.milliseconds(whole)
                share = counter.get_total_flops() / (taken / 1e3) / peak
                text = f"{taken:.2f} ms, {1e3 * batch / taken:.0f} images/s, {share:.0%} of the matmul peak"
                yield Row("network", f"{encoder}, {name}, batch {batch}, {machine.side} px", text)


def throughput_rows(machine: Machine, model: Path, where: str, flops: int, dtype: torch.dtype) -> Iterator[Row]:
    """Images a second of a runtime, bytes of images in and class ids out, both over the bus."""
    import numpy as np

    segmenter, peak = Segmenter(model, device=where, refine=False), matmul_peak(machine, dtype)
    shape = (machine.side, machine.side, 3)
    for batch in (1, 8, 32) if machine.gpu else (1, 2):
        images = list(np.random.default_rng(1).integers(0, 256, (batch, *shape), dtype=np.uint8))
        for _ in range(3 if machine.gpu else 1):
            segmenter.predict_masks(images)
        started = time.perf_counter()
        for _ in range(machine.repeats):
            segmenter.predict_masks(images)
        taken = (time.perf_counter() - started) / machine.repeats
        text = f"{1e3 * taken:.2f} ms, {batch / taken:.0f} images/s"
        if where != "cpu":
            text += f", {flops * batch / taken / peak:.0%} of the matmul peak of {dtype}"
        yield Row("runtimes", f"{model.name}, {where}, masks of {batch}, {machine.side} px", text)


def photograph_rows(machine: Machine, model: Path, where: str) -> Iterator[Row]:
    """Masks of images of another size than the network's: raised on the device, and on the host by `predict`."""
    import numpy as np

    side = machine.side
    segmenter = Segmenter(model, device=where, sizing=Sizing(long_side=side))
    count = 8 if machine.gpu else 2
    images = list(np.random.default_rng(2).integers(0, 256, (count, side * 5 // 4, side * 3 // 2, 3), dtype=np.uint8))
    place = segmenter.describe()["masks"].partition(":")[0]
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "on the host, by predict_batch": lambda: [result.mask for result in segmenter.predict_batch(images)],
        f"{place}, by predict_masks": lambda: segmenter.predict_masks(images),
    }
    expected = [result.mask for result in segmenter.predict_batch(images)]
    for name, masks in ways.items():
        agree = float(np.mean([(mask == right).mean() for mask, right in zip(masks(), expected, strict=True)]))
        started = time.perf_counter()
        for _ in range(machine.repeats):
            masks()
        rate = count * machine.repeats / (time.perf_counter() - started)
        text = f"{rate:.0f} images/s, {agree:.3%} of pixels as on the host"
        what = f"{model.name}, {where}, masks of {side * 3 // 2} x {side * 5 // 4} raised {name}"
        good = agree >= 0.999 and (where == "cpu" or place == "on the device")
        yield Row("runtimes", what, text, ">= 99.9 %, on the device", good)


def runtime_rows(machine: Machine) -> Iterator[Row]:
    """ONNX Runtime and TensorRT through `Segmenter.predict`, against torch; then many images at a time."""
    import numpy as np
    import onnxruntime
    from torch.utils.flop_counter import FlopCounterMode

    from export.onnx_graph import MODELS

    encoder = "vit_tiny_patch16_224" if machine.gpu else "test_vit"
    preprocessing = encoder_preprocessing(encoder, {})
    card = ModelCard(
        name="check",
        classes=("background", *(f"class {index}" for index in range(1, 21))),
        palette=tuple((index, index, index) for index in range(21)),
        architecture=Architecture(encoder=encoder),
        preprocessing=preprocessing,
        sizing=Sizing(long_side=None),
    )
    torch.manual_seed(0)
    network = build_network(card.architecture, 21, weights="none")
    image = np.random.default_rng(0).integers(0, 256, (machine.side, machine.side, 3), dtype=np.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        DeployedNetwork(network, preprocessing).eval()(torch.from_numpy(image)[None])
    flops = counter.get_total_flops()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pt"
        save_model(model, card, network.state_dict())
        device = str(machine.device)
        expected = {on: Segmenter(model, device=device, refine=on).predict(image).mask for on in (False, True)}
        largest = f"1x64x64/8x{machine.side}x{machine.side}/32x{machine.side}x{machine.side}"
        many = ("--precision", "fp16", "--shapes", largest)
        for kind, options in (("onnx", ()), ("engine", ()), ("engine", many)):
            # An artifact's name has its precision in it.
            exported = Path(folder) / Path(MODELS["fp16" if options else "fp32"]).with_suffix(f".{kind}")
            name = exported.name
            if kind == "engine" and (find_spec("tensorrt") is None or not machine.gpu):
                yield Row("runtimes", name, "not run: tensorrt is not installed, or no GPU is here")
                continue
            command = [
                sys.executable,
                "-m",
                "export.cli",
                str(model),
                "--format",
                kind,
                "--out",
                str(exported.parent),
                *options,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
                raise RuntimeError(f"wsss-export --format {kind} failed: {last}")
            where = device
            if kind == "onnx" and machine.gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                yield Row("runtimes", name, "this ONNX Runtime has no CUDA provider; on the CPU:")
                where = "cpu"
            if options or kind == "onnx":
                yield from throughput_rows(machine, exported, where, flops, torch.float16 if options else torch.float32)
            if options:
                continue
            yield from photograph_rows(machine, exported, where)
            for refine, mask in expected.items():
                segmenter = Segmenter(exported, device=where, refine=refine)
                agree = float((segmenter.predict(image).mask == mask).mean())
                started = time.perf_counter()
                for _ in range(machine.repeats):
                    segmenter.predict(image)
                taken = 1e3 * (time.perf_counter() - started) / machine.repeats
                text = f"{taken:.2f} ms a prediction, {agree:.2%} of pixels as torch"
                ran = segmenter.describe()
                what = f"{name}, {machine.side} px"
                if refine:
                    what += f", refined ({ran['refinement']['form']})"
                elif "copies" in ran:
                    text += f"; copies: {ran['copies']}"
                # On a GPU the scores have to be refined there, not on the host.
                good = agree >= 0.99 and (not refine or where == "cpu" or ran["refinement"]["form"] == "cuda")
                yield Row("runtimes", what, text, ">= 99 %, on the device", good)


SECTIONS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "tests": gpu_tests,
    "pairwise": pairwise_rows,
    "energy": energy_rows,
    "step": step_rows,
    "network": network_rows,
    "runtimes": runtime_rows,
}


@contextmanager
def told(rows: list[Row], section: str) -> Iterator[None]:
    """A section that fails is a row."""
    try:
        yield
    except Exception as error:  # the other sections are worth their time
        rows.append(Row(section, "failed", f"{type(error).__name__}: {error}".replace("\n", " ")[:300], "runs", False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a goal is missed")
    options = parser.parse_args()

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch finds no CUDA device; on a machine without one, --device cpu tries this program out")
        return 2
    machine = Machine(torch.device(options.device))
    rows: list[Row] = []
    print("| section | what | measured | goal | |\n|---|---|---|---|---|")
    for section in options.only:
        shown = len(rows)
        with told(rows, section):
            for row in SECTIONS[section](machine):
                rows.append(row)
        for row in rows[shown:]:
            if not machine.gpu and row.name != "failed":
                row.goal, row.ok = "", None
            mark = "" if row.ok is None else "met" if row.ok else "MISSED"
            print(f"| {row.section} | {row.name} | {row.value} | {row.goal} | {mark} |", flush=True)
    where = torch.cuda.get_device_name(machine.device) if machine.gpu else "CPU, a dry run"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"\n{where}; copy bandwidth {machine.copy_bandwidth / 1e9:.0f} GB/s; {versions}; {date.today()}")
    if options.json:
        report = {"rows": [asdict(row) for row in rows], "environment": describe_environment(), "device": where}
        options.json.write_text(json.dumps(report | {"date": str(date.today())}, indent=1) + "\n")
    return int(options.check and any(row.ok is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
