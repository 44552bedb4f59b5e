"""What holds for the pair energy of any probabilities, features and gates, in every form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsss_deploy.pairwise import EnergyParameters, EnergyTerm, energy

QUICK = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
ALL = ("p", "features", "source", "destination")


@pytest.fixture(params=["cpu", "torch"])
def form(request) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


@dataclass(frozen=True)
class Problem:
    p: torch.Tensor
    features: tuple[torch.Tensor, ...]
    source: torch.Tensor
    destination: torch.Tensor
    matrix: torch.Tensor | None
    parameters: EnergyParameters

    def solve(self, form: str, threads: int = 1) -> tuple[torch.Tensor, ...]:
        """Value, gradient to the probabilities, gradients to the features."""
        p, *features = (tensor.detach().clone().requires_grad_() for tensor in (self.p, *self.features))
        maps = [*features, *[None] * (len(self.parameters.terms) - len(features))]
        gates = {"source": self.source, "destination": self.destination}
        value = energy(p, maps, self.parameters, **gates, compatibility=self.matrix, form=form, threads=threads)
        value.backward()
        return value.detach(), p.grad, *(f.grad for f in features)

    def each(self, change) -> Problem:
        """With `change` applied to every map."""
        features = tuple(change(f) for f in self.features)
        return replace(self, features=features, **{n: change(getattr(self, n)) for n in ALL if n != "features"})


@st.composite
def problems(draw, potts=False, two_way=False):
    seed, batch = draw(st.integers(0, 2**31)), draw(st.integers(1, 2))
    # More classes than one group of accumulators holds, now and then.
    classes = draw(st.sampled_from([1, 2, 3, 26]))
    height, width = draw(st.sampled_from([(1, 1), (1, 9), (9, 1), (4, 5), (3, 18), (6, 7)]))
    generator = torch.Generator().manual_seed(seed)

    def normal(channels):
        return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)

    gates = [(normal(1) > draw(st.sampled_from([-9.0, 0.3]))).double() for _ in range(2)]
    matrix = None
    if not potts and draw(st.booleans()):
        matrix = torch.rand(classes, classes, generator=generator, dtype=torch.float64)
        matrix = matrix + matrix.mT if draw(st.booleans()) else matrix
    terms = (
        EnergyTerm(weight=0.9, xy_sigma=3.0),
        EnergyTerm(weight=0.4),
        EnergyTerm(weight=0.2, xy_sigma=2.0),
    )
    radius, one_way = draw(st.integers(1, 6)), not two_way and draw(st.booleans())
    parameters = EnergyParameters(radius=radius, terms=terms, one_way=one_way)
    features = normal(3), normal(draw(st.integers(1, 9))) / 3
    return Problem(normal(classes).mul(2).softmax(1), features, *gates, matrix, parameters)


def dense(problem: Problem, image: int) -> torch.Tensor:
    """The definition over all pairs of one image, as it stands in the document."""
    p, s, d = (t[image].flatten(1).mT for t in (problem.p, problem.source, problem.destination))
    height, width = problem.p.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([ys, xs]).flatten(1).mT.double()
    offset = place[:, None] - place
    inside = (offset.abs().amax(2) <= problem.parameters.radius) & (offset.abs().amax(2) > 0)
    kernel = torch.zeros_like(offset[..., 0])
    maps = [*problem.features, None]
    for term, feature in zip(problem.parameters.terms, maps, strict=True):
        exponent = torch.zeros_like(kernel)
        if feature is not None:
            f = feature[image].flatten(1).mT
            exponent = exponent + (f[:, None] - f).square().sum(2)
        if term.xy_sigma is not None:
            exponent = exponent + offset.square().sum(2) / term.xy_sigma**2
        kernel = kernel + term.weight * (-exponent / 2).exp()
    neighbour = p.detach() if problem.parameters.one_way else p
    cost = 1 - p @ neighbour.mT if problem.matrix is None else p @ problem.matrix @ neighbour.mT
    return (d * s.mT * inside * kernel * cost).sum()


def close(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@QUICK
@given(problem=problems())
def test_value_and_gradients_are_those_of_the_definition(problem, form):
    leaves = replace(
        problem,
        p=problem.p.clone().requires_grad_(),
        features=tuple(f.clone().requires_grad_() for f in problem.features),
    )
    expected = sum(dense(leaves, image) for image in range(len(problem.p)))
    inputs = (leaves.p, *leaves.features)
    gradients = torch.autograd.grad(expected, inputs, allow_unused=True)
    plain = [torch.zeros_like(i) if g is None else g for g, i in zip(gradients, inputs, strict=True)]
    close(problem.solve(form), (expected.detach(), *plain))


@QUICK
@given(problem=problems(), axes=st.sampled_from([(2,), (3,), (2, 3)]))
def test_a_mirrored_image_has_mirrored_gradients(problem, axes, form):
    value, *gradients = problem.solve(form)
    close(problem.each(lambda t: t.flip(axes)).solve(form), (value, *(g.flip(axes) for g in gradients)))


@QUICK
@given(problem=problems(), data=st.data())
def test_permuted_classes_have_permuted_gradients(problem, data, form):
    order = data.draw(st.permutations(range(problem.p.shape[1])))
    matrix = None if problem.matrix is None else problem.matrix[order][:, order]
    value, gradient, *others = problem.solve(form)
    permuted = replace(problem, p=problem.p[:, order].contiguous(), matrix=matrix)
    close(permuted.solve(form), (value, gradient[:, order], *others))


@QUICK
@given(problem=problems(two_way=True))
def test_the_gates_may_change_places_where_the_energy_is_symmetric(problem, form):
    if problem.matrix is not None:
        problem = replace(problem, matrix=problem.matrix + problem.matrix.mT)
    exchanged = replace(problem, source=problem.destination, destination=problem.source)
    close(exchanged.solve(form), problem.solve(form))


@QUICK
@given(problem=problems())
def test_a_batch_is_its_images_one_by_one(problem, form):
    value, *gradients = problem.solve(form)
    single = [problem.each(lambda t, n=n: t[n : n + 1].contiguous()).solve(form) for n in range(len(problem.p))]
    assert value.item() == pytest.approx(sum(one[0].item() for one in single), rel=1e-12, abs=1e-12)
    for index, gradient in enumerate(gradients):
        # The matrix product with a class matrix sums in another order, torch's all else.
        exact = form == "cpu" and problem.matrix is None
        tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-11, "atol": 1e-13}
        torch.testing.assert_close(gradient, torch.cat([one[index + 1] for one in single]), **tolerances)


@QUICK
@given(problem=problems(), threads=st.integers(2, 9), single=st.booleans())
def test_any_number_of_threads_gives_the_same_bits(problem, threads, single, compiled):
    if single:
        matrix = None if problem.matrix is None else problem.matrix.float()
        problem = replace(problem.each(torch.Tensor.float), matrix=matrix)
    for one, many in zip(problem.solve("cpu"), problem.solve("cpu", threads), strict=True):
        assert torch.equal(one, many)


@QUICK
@given(problem=problems(potts=True, two_way=True), kind=st.sampled_from(["one-hot", "uniform"]))
def test_equal_probabilities_pull_nowhere(problem, kind, form):
    """Equal one-hot predictions cost exactly 0; the gradient -w_i p leaves logits of one-hot and uniform p alone."""
    p = torch.zeros_like(problem.p)
    p[:, :1] = 1
    if kind == "uniform":
        p = torch.full_like(p, 1 / p.shape[1])
    value, gradient, *_ = replace(problem, p=p).solve(form)
    if kind == "one-hot":
        assert value == 0
        assert not gradient[:, 1:].any()
    logits = p * (gradient - (p * gradient).sum(1, keepdim=True))
    assert logits.abs().max() <= 1e-12 * (1 + gradient.abs().max())


@QUICK
@given(problem=problems(), gate=st.sampled_from(["source", "destination"]))
def test_an_empty_gate_gives_exactly_zero(problem, gate, form):
    empty = replace(problem, **{gate: torch.zeros_like(problem.source)})
    assert not any(result.any() for result in empty.solve(form))
