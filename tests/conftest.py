"""What tests share: the process's settings in every test, and the logged metrics by their literal definitions."""

import copy
import functools
import math
import os

import mujoco
import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs repeat byte by byte on a CPU


@pytest.fixture(autouse=True)
def process_settings():
    """One thread, as in a run: tiny networks gain nothing by more, and on a busy machine threads wait for each other.

    Denormal numbers are back on after a test: hypothesis draws none from a processor that flushes them.
    """
    torch.set_num_threads(1)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def compiled_models():
    """MuJoCo compiles an XML file once; every environment gets a copy of the model, which takes no time.

    The subprocesses of the tests compile as users do, and end with the same bytes.
    """
    compiled = functools.cache(mujoco.MjModel.from_xml_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco.MjModel, "from_xml_path", staticmethod(lambda path: copy.copy(compiled(path))))
        yield


@pytest.fixture
def assert_plasticity():
    """Compare what a script logs of one network with the hidden activations and the module that it should be of."""

    def check(plasticity: dict, net: str, module: torch.nn.Module, features: list[torch.Tensor], taus: dict) -> None:
        def logged(name: str) -> torch.Tensor:
            return plasticity[f"plasticity/{net}/{name}"]

        units = torch.cat([h.abs().mean(0) / h.abs().mean() for h in features])
        for name, tau in taus.items():
            assert logged(name) == pytest.approx((units <= tau).float().mean().item())
        positive = torch.cat([(h > 0).float().mean(0) for h in features]).mean().item()
        assert logged("active_fraction") == pytest.approx(positive)
        values = torch.linalg.svdvals(features[-1])
        assert logged("srank") == int((values.cumsum(0) / values.sum() < 0.99).sum()) + 1
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))
        assert logged("weight_norm") == pytest.approx(norm, rel=1e-4)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
        assert logged("grad_norm") == pytest.approx(norm, rel=1e-4)

    return check
