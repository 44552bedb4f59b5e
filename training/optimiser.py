"""Parameter groups and the learning-rate schedule, both pure functions so that a resumed run repeats them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from training.recipe import Optimisation

Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(encoder: nn.Module, others: Iterable[nn.Module], settings: Optimisation) -> torch.optim.Optimizer:
    """The optimiser over the encoder (base rate) and everything that starts from scratch (`decoder_factor` times that).

    Biases, norms and position tables (vectors, or names that timm lists in `no_weight_decay`) are not decayed.

    Args:
        encoder: Pretrained part.
        others: Decoder and a method's own heads.
        settings: Rates and decay.
    """
    exempt = _undecayed(encoder)
    groups = []
    for factor, parameters in _layers(encoder, settings.layer_decay):
        groups += _groups(parameters, factor, settings, exempt)
    for module in others:
        groups += _groups(module.named_parameters(), settings.decoder_factor, settings, frozenset())
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.999))


def _layers(encoder: nn.Module, decay: float) -> list[tuple[float, list[tuple[str, nn.Parameter]]]]:
    """The encoder's parameters by layer, input first, with the factor of its rate; one group without decay."""
    named = list(encoder.named_parameters())
    if decay == 1:
        return [(1.0, named)]
    depths = _depths(encoder, [name for name, _ in named])
    last = max(depths.values())
    layers: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(last + 1)]
    for name, parameter in named:
        layers[depths[name]].append((name, parameter))
    return [(decay ** (last + 1 - depth), layer) for depth, layer in enumerate(layers) if layer]


def _depths(encoder: nn.Module, names: list[str]) -> dict[str, int]:
    """By a parameter's name how many layers lie below its own.

    timm's models tell (`group_matcher`; the stem is 0, a final norm belongs to the last block). Of the few that do
    not, a layer is what has the same name up to its first number, as `stages.2`.
    """
    model = getattr(encoder, "model", None)
    matcher = getattr(model, "group_matcher", None)
    if model is not None and matcher is not None:
        told = {f"model.{name}": depth for name, depth in group_parameters(model, matcher(), reverse=True).items()}
        return {name: told.get(name, max(told.values())) for name in names}
    layers: dict[str, int] = {}
    found = {}
    for name in names:
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
        layer = numbered[0] if numbered else name.removeprefix("model.").partition(".")[0]
        found[name] = layers.setdefault(layer, len(layers))
    return found


def _undecayed(encoder: nn.Module) -> frozenset[str]:
    names = set()
    for prefix, module in encoder.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{prefix}.{name}".lstrip(".") for name in listed()}
    return frozenset(names)


def _groups(
    parameters: Iterable[tuple[str, nn.Parameter]], factor: float, settings: Optimisation, exempt: frozenset[str]
) -> list[dict[str, object]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay, "factor": factor},
        {"params": plain, "weight_decay": 0.0, "factor": factor},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(iteration: int, settings: Optimisation) -> float:
    """Base rate of an iteration: linear warm-up, and the decay (1 - t/T)^power; see `Optimisation.schedule`.

    Args:
        iteration: 0-based.
        settings: Peak rate, warm-up, power, length.
    """
    warmup = max(1, round(settings.warmup * settings.iterations))
    if settings.schedule == "switch" and iteration < warmup:
        start = settings.warmup_start
        return settings.learning_rate * (start + (1 - start) * iteration / warmup)
    rise = min(1.0, (iteration + 1) / warmup)
    left: float = (1.0 - iteration / settings.iterations) ** settings.power
    return settings.learning_rate * rise * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group to its factor times the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average for `AveragedModel` whose decay rises to its value.

    With a fixed decay a short run would end with a good part of its start still in the average. After n states it is
    at most (1 + n) / (10 + n), as in TensorFlow's `ExponentialMovingAverage`: about the last tenth of all states.

    Args:
        decay: Weight of the past after many states.
    """

    @torch.no_grad()
    def update(averages: Tensors, current: Tensors, count: Tensor | int) -> None:
        seen = float(count)
        weight = 1.0 - min(decay, (1.0 + seen) / (10.0 + seen))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, weight)
        else:  # counters
            for average, value in zip(averages, current, strict=True):
                average.copy_(value)

    return update
