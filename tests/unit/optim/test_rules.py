"""One step of every rule against numbers that were computed apart, and where many steps end in closed form."""

import math

import pytest
import torch
from torch import Tensor

from hpccl.config.optim import (
    AdditiveGroup,
    AffineGroup,
    BsamOptim,
    IvonOptim,
    LieOptim,
    MultiplicativeGroup,
    SamOptim,
    SobaOptim,
    VognOptim,
)
from hpccl.optim.ivon import Ivon
from hpccl.optim.lie import Lie
from hpccl.optim.sam import Bsam, Sam
from hpccl.optim.soba import Soba
from hpccl.optim.vogn import Vogn
from tests.unit.optim.rig import constant, drawing, take


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def parabola(w: Tensor) -> Tensor:
    return (w - 3).square()


def quadratic(curvature: float, centre: float) -> object:
    return lambda w: 0.5 * curvature * (w - centre).square()


def set_state(optimizer: torch.optim.Optimizer, tensor: Tensor, **values: float) -> None:
    for name, value in values.items():
        optimizer.state[tensor][name] = torch.full_like(tensor, value).detach()


# ---------------------------------------------------------------- IVON


@pytest.mark.parametrize(("rescale", "expected"), [(True, 1.38530507), (False, 1.64217511)])
def test_ivon_one_step(rescale: bool, expected: float) -> None:
    w = weights(1.0)
    config = IvonOptim(
        lr=(0.1,),
        curvature_decay=0.999,
        weight_decay=0.1,
        initial_curvature=0.5,
        effective_size=100.0,
        rescale_lr=rescale,
    )
    optimizer = Ivon([w], config)
    ((point, gradient),) = take(optimizer, w, parabola, constant(0.7))
    kept = optimizer.state[w]
    found = [point, gradient, kept["momentum"], kept["curvature"], w]
    numbers = [1.09036961, -3.81926078, -0.38192608, 0.47916613, expected]
    assert [float(value) for value in found] == pytest.approx(numbers, abs=5e-9)


def test_ivon_ends_at_the_posterior_of_a_quadratic() -> None:
    """m -> a b / (a + delta), E h -> a, for a (theta - b)^2 / 2."""
    a, b, delta, steps = 2.0, 3.0, 0.1, 1200
    w = torch.zeros(500, dtype=torch.float64)
    config = IvonOptim(weight_decay=delta, initial_curvature=1.0, curvature_decay=0.99, effective_size=100.0)
    optimizer = Ivon([w], config)
    curvature = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        take(optimizer, w, quadratic(a, b), drawing(step))  # type: ignore[arg-type]
        curvature += float(optimizer.state[w]["curvature"].mean()) / 500 if step >= steps - 500 else 0.0
    assert float(w.mean()) == pytest.approx(a * b / (a + delta), abs=2e-3)
    assert curvature == pytest.approx(a, rel=0.03)


def test_ivon_without_a_draw_learns_no_curvature() -> None:
    w = weights(1.0)
    optimizer = Ivon([w], IvonOptim())
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert float(optimizer.state[w]["curvature"]) == 1.0
    assert float(w) != 1.0


@pytest.mark.parametrize(("samples", "clip"), [(1, None), (3, None), (1, 0.05)])
def test_ivon_equals_the_package_of_its_authors(samples: int, clip: float | None) -> None:
    ivon = pytest.importorskip("ivon", reason="needs the package ivon-opt (of the extra dev)")
    theirs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()]
    ours = theirs[0].detach().clone()
    there = ivon.IVON(
        theirs,
        lr=0.1,
        ess=50.0,
        hess_init=0.3,
        beta2=0.95,
        weight_decay=0.02,
        mc_samples=samples,
        clip_radius=math.inf if clip is None else clip,
    )
    config = IvonOptim(
        samples=samples,
        initial_curvature=0.3,
        curvature_decay=0.95,
        weight_decay=0.02,
        effective_size=50.0,
        clip=clip,
    )
    here = Ivon([ours], config)
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))

    def loss(w: Tensor) -> Tensor:
        return (w - target).square() * torch.arange(1.0, 13.0).view(4, 3) + w.sin()

    for step in range(40):
        for number in range(samples):
            torch.manual_seed(10 * step + number)
            with there.sampled_params(train=True):
                theirs[0].grad = None
                loss(theirs[0]).sum().backward()
        there.step()

        def same(tensor: Tensor, number: int, step: int = step) -> Tensor:
            torch.manual_seed(10 * step + number)
            return torch.randn(12).view(4, 3)

        take(here, ours, loss, same)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-6, atol=1e-6)
    curvature = here.state[ours]["curvature"].flatten()
    torch.testing.assert_close(curvature, there.param_groups[0]["hess"], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- SAM and bSAM


def test_sam_one_step_climbs_along_the_gradient_and_keeps_a_heavy_ball() -> None:
    w = weights(1.0, -2.0)
    optimizer = Sam([w], SamOptim(lr=(0.1,), radius=0.5, momentum=0.9, weight_decay=0.01))
    for _ in range(2):
        before = w.detach().clone()
        gradient = 2 * (before - 3)
        at_worst = 2 * (before + 0.5 * gradient / gradient.norm() - 3)
        momentum = optimizer.state[w].get("momentum", torch.zeros(2, dtype=torch.float64)).clone()
        (first, _), (second, found) = take(optimizer, w, parabola, constant(0.0))
        torch.testing.assert_close(first, before)
        torch.testing.assert_close(second, before + 0.5 * gradient / gradient.norm())
        torch.testing.assert_close(found, at_worst)
        torch.testing.assert_close(w.detach(), before - 0.1 * (0.9 * momentum + at_worst + 0.01 * before))


def test_bsam_one_step() -> None:
    w = weights(1.0)
    config = BsamOptim(lr=(0.5,), radius=0.05, prior_precision=1.0, damping=0.1, initial_curvature=1.0)
    optimizer = Bsam([w], config)
    optimizer.begin(num_train=100)
    (point, gradient), (worst, found) = take(optimizer, w, parabola, constant(0.7))
    kept = optimizer.state[w]
    values = [point, gradient, worst - 1, found, kept["momentum"], w, kept["curvature"]]
    numbers = [1.07, -3.86, -0.193, -4.386, -0.4376, 1.2188, 1.00297]
    assert [float(value) for value in values] == pytest.approx(numbers, abs=1e-9)


def test_bsam_curvature_ends_where_the_closed_form_says() -> None:
    """|g| = 2 for ever: s = ((2 + sqrt(4 + 4 (gamma + delta))) / 2)^2."""
    w = weights(0.0)
    config = BsamOptim(lr=(1e-9,), prior_precision=1.0, damping=0.1, curvature_decay=0.9)
    optimizer = Bsam([w], config)
    optimizer.begin(num_train=100)
    for step in range(600):
        take(optimizer, w, lambda w: 2 * w, drawing(step))
    assert float(optimizer.state[w]["curvature"]) == pytest.approx(4.217130751, abs=1e-8)


def test_bsam_without_radius_and_noise_is_preconditioned_momentum() -> None:
    w = weights(1.0)
    config = BsamOptim(lr=(0.1,), radius=1e-300, prior_precision=0.0, initial_curvature=2.0)
    optimizer = Bsam([w], config)
    set_state(optimizer, w, momentum=0.3)
    take(optimizer, w, parabola, constant(0.0))
    momentum = 0.9 * 0.3 + 0.1 * (-4.0)
    assert float(w) == pytest.approx(1 - 0.1 * momentum / 2, abs=1e-12)


# ---------------------------------------------------------------- VOGN


def test_vogn_one_step() -> None:
    w = weights(0.5)
    config = VognOptim(
        lr=(0.01,), momentum=0.9, curvature_rate=1e-3, prior_precision=50.0, augmentation=5.0, damping=1e-3
    )
    optimizer = Vogn([w], config)
    optimizer.begin(num_train=1000)
    set_state(optimizer, w, curvature=0.02, momentum=0.1)
    examples = torch.tensor([-1.0, 0.4], dtype=torch.float64)
    w.grad = examples.mean().view(1)
    optimizer.add_squares(w, examples.square().mean().view(1))
    optimizer.step()
    kept = optimizer.state[w]
    found = [float(value) for value in (kept["momentum"], kept["curvature"], w)]
    assert found == pytest.approx([-0.205, 0.02056, 0.5649556400506971], abs=1e-12)
    (trial,) = optimizer.trial(0, [w], constant(1.0)) or []
    assert float((trial - w).square()) == pytest.approx(0.006337135614702154, abs=1e-12)


def test_vogn_ends_at_ridge_and_the_mean_square() -> None:
    """Of (theta - y)^2 / 2: mu -> mean y / (1 + delta~), s -> mean (mu - y)^2, which is not the Hessian."""
    y = 3 + 2 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = weights(0.0)
    config = VognOptim(curvature_rate=0.05, prior_precision=10.0, momentum=0.0, augmentation=1.0)
    optimizer = Vogn([w], config)
    optimizer.begin(num_train=1000)
    centre = curvature = 0.0
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 2.0 / (1 + 0.1 * step)
        (trial,) = optimizer.trial(0, [w], drawing(step)) or []
        gradients = trial.detach() - y
        w.grad = gradients.mean().view(1)
        optimizer.note(0, [w], torch.linalg.vector_norm)
        optimizer.add_squares(w, gradients.square().mean().view(1))
        optimizer.step()
        if step >= 400:
            centre, curvature = centre + float(w) / 200, curvature + float(optimizer.state[w]["curvature"]) / 200
    assert centre == pytest.approx(float(y.mean()) / 1.01, abs=0.02)
    assert curvature == pytest.approx(float((centre - y).square().mean()), rel=0.02)


def test_vogn_first_step_is_at_the_weights_and_norms_are_never_drawn() -> None:
    w, norm = weights(0.5), weights(0.7)
    optimizer = Vogn([{"params": [w]}, {"params": [norm], "prior": False}], VognOptim())
    optimizer.begin(num_train=10)
    first = optimizer.trial(0, [w, norm], constant(1.0)) or []
    assert [float(value) for value in first] == [0.5, 0.7]
    for tensor in (w, norm):
        tensor.grad = torch.zeros(1, dtype=tensor.dtype)
        optimizer.add_squares(tensor, torch.ones(1, dtype=tensor.dtype))
    optimizer.step()
    later = optimizer.trial(0, [w, norm], constant(1.0)) or []
    assert float(later[0]) > float(w) + 0.1
    assert float(later[1]) == 0.7


# ---------------------------------------------------------------- SOBA


def soba(w: Tensor, *, rate: float, lr: float = 0.05, num_train: int = 1, first: float = 1.0) -> Soba:
    optimizer = Soba([w], SobaOptim(lr=(lr,), curvature_rate=rate, prior_precision=0.0, initial_curvature=first))
    optimizer.begin(num_train=num_train)
    return optimizer


def test_soba_one_step() -> None:
    """s = 4, rho = 0.1, e = 0.3 at m = 1: h = -4.08."""
    w = weights(1.0)
    optimizer = soba(w, rate=0.1, first=4.0)
    ((point, gradient),) = take(optimizer, w, parabola, constant(0.6))  # e = 0.6 / sqrt(4)
    assert float(point) == pytest.approx(1.3)
    assert float(gradient) == pytest.approx(-3.4)
    assert float(optimizer.state[w]["curvature"]) == pytest.approx(3.273608, abs=1e-9)
    assert float(w) == pytest.approx(1 + 0.05 * 3.4 / 3.273608, abs=1e-9)


def test_soba_ends_at_a_constant_hessian() -> None:
    """h = 2 for ever: s -> 2, where a term h^2 in place of (h - s)^2 would end at 2.095."""
    w = weights(1.0)
    optimizer = soba(w, rate=0.1)
    for _ in range(400):
        s = float(optimizer.state[w].get("curvature", torch.ones(1)))
        take(optimizer, w, lambda w, s=s: 2 / (s * s**-0.5) * w, constant(1.0))  # type: ignore[misc]
    assert float(optimizer.state[w]["curvature"]) == pytest.approx(2.0, abs=1e-9)


def test_soba_estimates_the_hessian_by_gradient_times_displacement() -> None:
    """S1: g s e = -4.08 at s = 4, e = .3; with sqrt(s) for s it would be -2.04."""
    w = weights(1.0)
    optimizer = soba(w, rate=0.1, first=4.0)
    trial = optimizer.trial(0, [w], constant(0.6))
    assert trial is not None
    w.grad = 2 * (trial[0] - 3)
    optimizer.note(0, [w], lambda gradients: gradients[0].norm())
    products = optimizer.products([w])
    assert products is not None
    assert float(products[0][0] * optimizer.state[w]["curvature"]) == pytest.approx(-4.08, abs=1e-12)


def test_soba_ends_near_the_hessian_of_a_drawn_quadratic() -> None:
    """S2: a = 2, rho = .02: the median of s is 2.02; with g sqrt(s) e and h^2 in the rule it is 1.6."""
    w = torch.zeros(2000, dtype=torch.float64)
    optimizer = soba(w, rate=0.02, lr=1e-9)
    medians = []
    for step in range(600):
        take(optimizer, w, quadratic(2.0, 0.0), drawing(step))  # type: ignore[arg-type]
        medians.append(float(optimizer.state[w]["curvature"].median()))
    assert sum(medians[300:]) / 300 == pytest.approx(2.02, abs=0.01)


@pytest.mark.slow
def test_soba_in_units_of_the_summed_loss() -> None:
    """N and the prior: s -> N a + delta, m -> N a b / (N a + delta)."""
    a, b, num_train, delta, steps = 2.0, 1.0, 50, 10.0, 1000
    w = torch.zeros(400, dtype=torch.float64)
    optimizer = Soba([w], SobaOptim(curvature_rate=0.01, prior_precision=delta))
    optimizer.begin(num_train=num_train)
    total = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        take(optimizer, w, quadratic(a, b), drawing(step))  # type: ignore[arg-type]
        total += float(optimizer.state[w]["curvature"].mean()) / 500 if step >= steps - 500 else 0.0
    assert float(w.mean()) == pytest.approx(num_train * a * b / (num_train * a + delta), abs=1e-2)
    assert total == pytest.approx(num_train * a + delta, rel=0.04)  # above by rho (noise of h / s)^2 / 2


# ---------------------------------------------------------------- Lie groups


def lie(w: Tensor, group: object, *, num_train: int = 1, **settings: object) -> Lie:
    optimizer = Lie([w], LieOptim(group=group, prior_precision=0.0, **settings))  # type: ignore[arg-type]
    optimizer.begin(num_train=num_train)
    return optimizer


@pytest.mark.slow
def test_affine_ends_at_the_posterior_of_a_quadratic() -> None:
    """L1: A^2 sigma0^2 -> t / a, b -> c."""
    a, c, steps = 2.0, 3.0, 1200
    w = torch.zeros(300, dtype=torch.float64)
    group = AffineGroup(noise=0.1, scale_lr=0.1, scale_momentum=0.9, initial_scale=1.0)
    optimizer = lie(w, group, num_train=50, temperature=1.0, lr=(1.0,), momentum=0.5)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1 - step / steps
        take(optimizer, w, quadratic(a, c), drawing(step))  # type: ignore[arg-type]
    variance = (optimizer.state[w]["scale"] * 0.1).square()
    assert float(variance.log().mean().exp()) == pytest.approx(1 / 50 / a, rel=0.05)
    assert float(w.mean()) == pytest.approx(c, abs=0.01)


def test_affine_step_without_a_slope_is_preconditioned_descent() -> None:
    """L3: with M_U = 0 (displacement 0 and T = 0), b <- b - r A M_V."""
    w = weights(1.0)
    optimizer = lie(w, AffineGroup(initial_scale=0.7), temperature=0.0, lr=(0.3,), momentum=0.8)
    take(optimizer, w, parabola, constant(0.0))
    assert float(w) == pytest.approx(1 - 0.3 * 0.7 * (0.2 * 0.7 * -4.0), abs=1e-12)
    assert float(optimizer.state[w]["scale"]) == 0.7


@pytest.mark.parametrize(("lr", "task"), [((0.3,), 0), ((0.3,), 2), ((3.0, 0.3), 1)])
def test_affine_step_in_closed_form(lr: tuple[float, ...], task: int) -> None:
    """The exponential map, M_U far from 0, and the prior at the weights that were drawn; in a task of this peak."""
    w = weights(1.0)
    config = LieOptim(
        lr=lr, group=AffineGroup(noise=0.5, scale_lr=0.2, scale_momentum=0.9), momentum=0.8, prior_precision=5.0
    )
    optimizer = Lie([w], config)
    optimizer.begin(num_train=10, task=task)
    optimizer.param_groups[0]["lr"] = 0.15  # half of the peak, so alpha2 is halved too
    ((point, gradient),) = take(optimizer, w, parabola, constant(1.0))
    u = 0.1 * (0.5 * (float(gradient) + 0.5 * float(point)) - 0.1)
    v = 0.2 * (float(gradient) + 0.5 * 1.0)
    assert float(w) == pytest.approx(1 + v * (math.exp(-0.15 * u) - 1) / u, abs=1e-12)
    assert float(optimizer.state[w]["scale"]) == pytest.approx(math.exp(-0.1 * u), abs=1e-12)


@pytest.mark.slow
def test_multiplicative_ends_where_the_closed_form_says() -> None:
    """L2: a theta^2 / 2 with one side: g -> sqrt(t / (2 a)), as E x^2 = 2."""
    a, t, steps = 2.0, 0.02, 1200
    w = torch.full((400,), 0.5, dtype=torch.float64)
    optimizer = lie(w, MultiplicativeGroup(offset=1e-12), num_train=50, temperature=1.0, lr=(1.0,))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.5 * (1 - step / steps)
        for tensor in optimizer.state.values():
            if "inhibition" in tensor:
                tensor["inhibition"].fill_(1e-12)
        take(optimizer, w, quadratic(a, 0.0), drawing(step))  # type: ignore[arg-type]
    assert float(optimizer.state[w]["excitation"].log().mean().exp()) == pytest.approx(math.sqrt(t / (2 * a)), rel=0.05)


def test_multiplicative_step_in_closed_form() -> None:
    w = weights(0.4)
    optimizer = lie(w, MultiplicativeGroup(offset=0.1), num_train=10, temperature=1.0, lr=(0.2,), momentum=0.5)
    ((point, gradient),) = take(optimizer, w, parabola, constant(1.0))  # x = sqrt(2)
    length = math.sqrt(2)
    assert float(point) == pytest.approx(length * 0.5 - length * 0.1)
    plus = 0.5 * math.exp(-0.2 * 0.5 * (length * 0.5 * float(gradient) - 0.1))
    minus = 0.1 * math.exp(-0.2 * 0.5 * (-length * 0.1 * float(gradient) - 0.1))
    assert float(w) == pytest.approx(plus - minus, abs=1e-12)


def test_additive_step_in_closed_form() -> None:
    w = weights(1.0)
    config = LieOptim(lr=(0.1,), group=AdditiveGroup(noise=0.2), momentum=0.5, prior_precision=3.0)
    optimizer = Lie([w], config)
    optimizer.begin(num_train=10)
    ((point, _),) = take(optimizer, w, parabola, constant(1.0))
    assert float(point) == pytest.approx(1.2)
    assert float(w) == pytest.approx(1 - 0.1 * 0.5 * (2 * (1.2 - 3) + 0.3), abs=1e-12)
