"""What has to happen before the CUDA forms are offered, tried out with a stand-in for the driver."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import PairwiseParameters, cuda_check, cuda_form, cuda_source, energy_cuda_form

FORMS = {"operator": cuda_form, "energy": energy_cuda_form}


@pytest.fixture(params=FORMS)
def module(request, driver, monkeypatch):
    """A form's module, whose check takes the CPU for the device."""
    monkeypatch.setattr(cuda_check, "place_of", lambda _: torch.device("cpu"))
    return FORMS[request.param]


CHANGES = {
    "groups of four": ("Storage(total[c].at[pixel])", "Storage(0)", "float", "float32, 36 pixels wide"),
    "groups of four in 16 bits": ("Storage(total[c].at[pixel])", "Storage(0)", "__half", "float16, 36 pixels wide"),
    "a whole group's offset": ("load(from + c * stride)", "load(from)", "float", "float32, 36 pixels wide"),
    "pixel by pixel": ("write(first + c, total[c])", "write(first + c, 0.0f)", "float", "float32, 37 pixels wide"),
    "variation": ("float(WSSS_SECOND)", "0.0f", "__half", "varm, float16"),
    "gaussian": ("exponential(exponent) * terms[t].weight", "terms[t].weight", "float", "gaussian"),
    "mean field": ("total * float(WSSS_COMPATIBILITY)", "0.0f", "float", "gaussian"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_part_of_the_kernels_can_be_wrong_unseen(change, driver, monkeypatch):
    before, after, storage, told = CHANGES[change]
    right = cuda_source.source

    def wrong(parameters, kind):
        text = right(parameters, kind)
        assert before in text
        return text.replace(before, after) if kind == storage else text

    monkeypatch.setattr(cuda_source, "source", wrong)
    monkeypatch.setattr(cuda_check, "place_of", lambda _: torch.device("cpu"))
    answer = cuda_form.check(0)
    assert told in answer
    assert "differs from torch's" in answer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_tensors_has_no_part(module, dtype):
    torch.set_default_dtype(dtype)
    try:
        assert module.check(0) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_fake_tensors_and_transforms_about_it_have_no_part(module):
    with FakeTensorMode():
        assert module.check(0) is None
    module.check.cache_clear()

    class Asks(torch.nn.Module):
        def forward(self, value):
            return value + (1 if module.check(0) is None else 2)

    program = torch.export.export(Asks(), (torch.ones(2),), strict=False)
    assert torch.equal(program.module()(torch.ones(2)), torch.full((2,), 2.0))
    module.check.cache_clear()
    torch.vmap(Asks())(torch.ones(3, 2))
    assert module.check(0) is None


PASSING = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    "driver": RuntimeError("the CUDA driver refuses the kernels (CUDA_ERROR_OUT_OF_MEMORY)"),
    "capture": RuntimeError("CUDA error: operation not permitted when stream is capturing"),
}


@pytest.mark.parametrize("failure", PASSING)
def test_what_may_pass_is_asked_again(module, failure, monkeypatch):
    with monkeypatch.context() as once:
        once.setattr(module, "launch", lambda *_: (_ for _ in ()).throw(PASSING[failure]))
        assert str(PASSING[failure]) in module.check(0)
    assert module.check(0) is None
    module.check.cache_clear()
    with monkeypatch.context() as once:
        once.setattr(module, "launch", lambda *_: [].pop())
        assert "IndexError" in module.check(0)
    assert "IndexError" in module.check(0), "this lasts"


def test_it_is_not_tried_out_within_a_graphs_capture(module, monkeypatch):
    with monkeypatch.context() as once:
        once.setattr(torch.cuda, "is_available", lambda: True)
        once.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        once.setattr(module, "launch", lambda *_: pytest.fail("launched"))
        assert "once before" in module.check(0)
    assert module.check(0) is None


def test_fake_tensors_reach_no_kernel(driver):
    parameters = PairwiseParameters(dilations=(1,), iterations=1)
    with FakeTensorMode():
        masks = torch.rand(1, 2, 4, 4)
        with pytest.raises(UsageError, match="fake tensor of shape"):
            cuda_form.refine(parameters, masks, masks, None, torch.empty_like(masks))
    assert driver.launches == []
