"""The training loop: any method, one loop.

Devices and precision are Lightning Fabric's; when losses switch on is the method's. Every iteration is a function of
the recipe, the seed and its number, so that a resumed run repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.data.pipeline import PositionSampler, TrainingSet, make_loader
from training.evaluate import EvaluationResult
from training.methods import Batch, Method
from training.optimiser import build_optimizer, learning_rate, moving_average, set_learning_rate
from training.recipe import Recipe
from training.report import RunReport
from training.state import CHECKPOINT, load_checkpoint, random_state, save_checkpoint, set_random_state
from wsss_deploy.card import Preprocessing
from wsss_deploy.errors import TrainingError
from wsss_deploy.networks import SegmentationNetwork

_log = logging.getLogger(__name__)

# Crops up to this many pixels a side: their attention matrices fit into memory for every block at once.
_PLAIN_ATTENTION_SIZE = 512

Evaluate = Callable[[SegmentationNetwork], EvaluationResult | None]


class _Step(nn.Module):
    """Network and method as one module, so that Fabric wraps a single forward."""

    def __init__(self, network: SegmentationNetwork, method: Method) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, tensors: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        # Fabric converts tensors in plain containers only, so that the batch is put together here.
        losses: dict[str, Tensor] = self.method(self.network, Batch(**tensors), progress)
        return losses


@dataclass
class Best:
    """The best state so far: its network's tensors, its evaluation and the iteration after which it stood."""

    state: dict[str, Tensor]
    result: EvaluationResult
    iteration: int


@dataclass(frozen=True)
class Trained:
    """What a run gives.

    Attributes:
        state: The chosen network's tensors on the CPU.
        selection: "best-val-miou" or "last".
        iteration: The iteration after which that state stood.
        result: Its evaluation, or None without masks for the validation split.
        seconds: Training time without evaluations, over all processes of a run that was resumed.
    """

    state: dict[str, Tensor]
    selection: str
    iteration: int
    result: EvaluationResult | None
    seconds: float


class Trainer:
    """One run.

    Args:
        recipe: What to do.
        network: Fresh network; trained in place.
        method: The losses.
        dataset: Training images.
        preprocessing: Normalisation.
        folder: Run folder for checkpoint and logs.
        evaluate: Called with the network now and then; returns None where the split has no masks.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: SegmentationNetwork,
        method: Method,
        dataset: TrainingSet,
        preprocessing: Preprocessing,
        folder: Path,
        evaluate: Evaluate,
    ) -> None:
        self.recipe, self.folder, self._evaluate = recipe, folder, evaluate
        self._dataset = dataset
        self._fabric = make_fabric(recipe)
        optimizer = build_optimizer(network.encoder, [network.decoder, method], recipe.optimisation)
        self._module, self._optimizer = self._fabric.setup(_Step(network, method), optimizer)
        device = self._fabric.device
        if device.type == "cpu" and recipe.augmentation.size <= _PLAIN_ATTENTION_SIZE:
            use_plain_attention(network.encoder)
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * 255
        self._average = self._make_average()
        method.set_teacher(None if self._average is None else self.network)
        self._best: Best | None = None
        self._iteration = 0
        self._seconds = 0.0

    @property
    def network(self) -> SegmentationNetwork:
        """The network as it is to be used: the moving average where one is kept."""
        averaged = self._average.module if self._average is not None else self._module.module.network
        assert isinstance(averaged, SegmentationNetwork)
        return averaged

    def _make_average(self) -> AveragedModel | None:
        decay = self.recipe.optimisation.ema
        if not decay:
            return None
        return AveragedModel(self._module.module.network, multi_avg_fn=moving_average(decay), use_buffers=True).to(
            self._fabric.device
        )

    def run(self, resume: bool = False, show: bool = True) -> Trained:
        """Train to the end.

        Args:
            resume: Go on from the run folder's checkpoint.
            show: Progress on the terminal.

        Raises:
            TrainingError: Nothing to resume from, or a loss that is not finite.
            KeyboardInterrupt: After SIGINT or SIGTERM; a checkpoint of the last full iteration has been written.
        """
        settings = self.recipe.optimisation
        generators = self._load() if resume else None
        sampler = PositionSampler(len(self._dataset), self.recipe.seed, self._iteration * settings.batch_size)
        loader = make_loader(self._dataset, settings.batch_size, sampler, self._workers())
        saved = time.monotonic()
        with RunReport(self.folder, settings.iterations, self._iteration, show) as report, _stop_signals() as stopped:
            batches = iter(loader)
            if generators is not None:
                # After the loader's start, which draws a number of its own.
                set_random_state(generators)
            while self._iteration < settings.iterations:
                started = time.perf_counter()
                self._step(next(batches), report)
                self._seconds += time.perf_counter() - started
                last = self._iteration == settings.iterations
                if last or self._iteration % self.recipe.evaluation.every == 0:
                    self._validate(report)
                if last or stopped() or time.monotonic() - saved > self.recipe.checkpoint_every:
                    self._save(report)
                    saved = time.monotonic()
                if stopped() and not last:
                    raise KeyboardInterrupt(f"stopped after iteration {self._iteration}")
        if self._best is None:
            return Trained(_to_cpu(self.network.state_dict()), "last", self._iteration, None, self._seconds)
        return Trained(self._best.state, "best-val-miou", self._best.iteration, self._best.result, self._seconds)

    def _step(self, raw: dict[str, Tensor], report: RunReport) -> None:
        settings = self.recipe.optimisation
        rate = learning_rate(self._iteration, settings)
        set_learning_rate(self._optimizer, rate)
        self._module.train()
        tensors = self._on_device(raw)
        losses = self._module(tensors, self._iteration / settings.iterations)
        total = torch.stack([value.float() for value in losses.values()]).sum()
        values = {name: float(value.detach()) for name, value in losses.items()}
        if not all(math.isfinite(value) for value in values.values()):
            parts = ", ".join(f"{name} {value}" for name, value in values.items())
            raise TrainingError(
                f"the loss is not finite at iteration {self._iteration} ({parts}); lower "
                "optimisation.learning_rate, or use precision: fp32"
            )
        self._optimizer.zero_grad(set_to_none=True)
        if total.requires_grad:
            self._fabric.backward(total)
            if settings.clip:
                self._fabric.clip_gradients(
                    self._module, self._optimizer, max_norm=settings.clip, error_if_nonfinite=False
                )
            self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self._module.module.network)
        report.step(self._iteration, values | {"total": sum(values.values())}, rate, len(tensors["image"]))
        self._iteration += 1

    def _on_device(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: value.to(self._fabric.device, non_blocking=True) for name, value in raw.items()}
        return tensors | {"image": (tensors["image"].float() - self._mean) / self._std}

    def _validate(self, report: RunReport) -> None:
        network = self.network
        training = network.training
        result = self._evaluate(network.eval())
        network.train(training)
        if result is not None:
            report.record(self._iteration, {"val/miou": result.miou, "val/boundary_miou": result.mean_boundary_iou})
            _log.info("iteration %d: val mIoU %.4f (%d images)", self._iteration, result.miou, result.images)
            if self._best is None or result.miou > self._best.result.miou:
                self._best = Best(_to_cpu(network.state_dict()), result, self._iteration)
        report.pause()

    def _workers(self) -> int:
        if self.recipe.workers is not None:
            return self.recipe.workers
        return 0 if self._fabric.device.type == "cpu" else min(8, max(1, torch.get_num_threads() - 1))

    def _save(self, report: RunReport) -> None:
        report.flush()
        average = None if self._average is None else self._average.state_dict()
        best = None
        if self._best is not None:
            best = {**vars(self._best), "result": asdict(self._best.result)}
        state: dict[str, Any] = {
            "iteration": self._iteration,
            "seconds": self._seconds,
            "module": self._module.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._fabric.strategy.precision.state_dict(),
            "average": average,
            "best": best,
            "random": random_state(),
        }
        save_checkpoint(self.folder / CHECKPOINT, self.recipe, state)

    def _load(self) -> dict[str, Any]:
        state = load_checkpoint(self.folder / CHECKPOINT, self.recipe)
        self._module.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._fabric.strategy.precision.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if state["best"] is not None:
            self._best = Best(**state["best"] | {"result": EvaluationResult(**state["best"]["result"])})
        self._iteration = int(state["iteration"])
        self._seconds = float(state.get("seconds", 0.0))  # checkpoints had none before 2026-11-23
        _log.info("resumed after iteration %d", self._iteration)
        return dict(state["random"])


def use_plain_attention(encoder: nn.Module) -> None:
    """Let timm's attention layers multiply matrices instead of calling torch's fused attention.

    The fused kernel saves memory but is slow on a CPU at the few hundred tokens of a training crop: a step of
    ViT-Tiny at 256 px in bf16 takes 1.6 times as long with it (`benchmarks/attention.py`).

    Args:
        encoder: Changed in place; modules without timm's `fused_attn` switch stay as they are.
    """
    module: Any
    for module in encoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def make_fabric(recipe: Recipe) -> Fabric:
    """Fabric for the recipe's device and precision.

    Raises:
        TrainingError: See `device_and_precision`.
    """
    device, precision = device_and_precision(recipe)
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells the precision in its own words
    return Fabric(accelerator=device, devices=1, precision=precision)


def device_and_precision(recipe: Recipe) -> tuple[Literal["cpu", "cuda"], Any]:
    """The device that the recipe asks for, and Fabric's name of the precision.

    Raises:
        TrainingError: CUDA was asked for and is not there, or a precision that the device does not have.
    """
    cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not cuda:
        raise TrainingError("device: cuda was asked for, but torch finds no CUDA device; use device: cpu or auto")
    on_gpu = cuda and recipe.device != "cpu"
    if recipe.precision == "fp16" and not on_gpu:
        raise TrainingError("precision: fp16 needs a CUDA device; use bf16 or fp32 on a CPU")
    native = torch.cuda.is_bf16_supported() if on_gpu else _cpu_has_bf16()
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and native)
    precision: Any = "bf16-mixed" if bf16 else "16-mixed" if recipe.precision == "fp16" else "32-true"
    return ("cuda" if on_gpu else "cpu"), precision


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (about twice as fast); elsewhere bf16 would be slower than fp32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that the iteration in progress is finished and saved first.

    A second SIGINT interrupts at once. Signals belong to the main thread; elsewhere nothing is changed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
