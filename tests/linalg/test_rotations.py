"""Rotations against their definitions in fp64."""

from __future__ import annotations

import functools

import pytest
import torch

from peftsurgery.linalg import rotations


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
def test_cayley_and_its_gradient(scale: float, rng: torch.Generator) -> None:
    skew = rotations.skew_part(torch.randn(5, 7, 7, generator=rng)) * scale
    skew.requires_grad_(True)
    target = torch.randn(5, 7, 7, generator=rng)
    got = rotations.cayley(skew)
    (gradient,) = torch.autograd.grad((got * target).sum(), skew)
    exact = skew.detach().double().requires_grad_(True)
    eye = torch.eye(7, dtype=torch.float64)
    wanted = torch.linalg.solve(eye - exact, eye + exact)
    (right,) = torch.autograd.grad((wanted * target).sum(), exact)
    got, wanted = got.detach(), wanted.detach()
    assert float((got.double() - wanted).abs().max()) < 1e-5
    assert float((gradient - right).norm() / right.norm()) < 1e-4 * (1 + scale)
    assert float((got @ got.mT - eye).abs().max()) < 2e-5


@pytest.mark.parametrize("half_last", [True, False])
@pytest.mark.parametrize("terms", range(1, 8))
def test_neumann_is_the_sum_of_powers(terms: int, half_last: bool, rng: torch.Generator) -> None:
    skew = rotations.skew_part(torch.randn(3, 4, 4, generator=rng, dtype=torch.float64)) * 0.3
    last = (max(terms - 1, 3) if half_last else terms - 1) if terms > 2 else terms - 1
    wanted = torch.eye(4, dtype=torch.float64).expand(3, 4, 4).clone()
    for k in range(1, last + 1):
        weight = 1 if terms > 2 and half_last and k == last else 2
        wanted += weight * torch.linalg.matrix_power(skew, k)
    got = rotations.cayley_neumann(skew, terms, half_last=half_last)
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 0, 12), (2, 5, 12)])
def test_turn_is_block_by_block(shape: tuple[int, ...], rng: torch.Generator) -> None:
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    blocks = torch.randn(4, 3, 3, generator=rng, dtype=torch.float64)
    assert torch.allclose(rotations.turn(x, blocks), x @ torch.block_diag(*blocks).T)


@pytest.mark.parametrize("inverse", [False, True])
def test_householder_is_the_product(inverse: bool, rng: torch.Generator) -> None:
    u = rotations.normalized_columns(torch.randn(9, 5, generator=rng, dtype=torch.float64))
    u = u * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    product = torch.eye(9, dtype=torch.float64)
    for column in u.unbind(1):
        product = product @ (torch.eye(9, dtype=torch.float64) - 2 * torch.outer(column, column))
    x = torch.randn(2, 6, 9, generator=rng, dtype=torch.float64)
    got = rotations.householder(x, u, inverse=inverse)
    assert torch.allclose(got, x @ (product.T if inverse else product))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("width", "columns"), [(7, 4), (3, 5), (1, 1)])
def test_gradients_of_householder_are_right(
    inverse: bool, width: int, columns: int, rng: torch.Generator
) -> None:
    x = torch.randn(2, 3, width, generator=rng, dtype=torch.float64, requires_grad=True)
    u = torch.randn(width, columns, generator=rng, dtype=torch.float64)
    u = (u * torch.logspace(-2, 2, columns, dtype=torch.float64)).requires_grad_()
    call = functools.partial(rotations.householder, inverse=inverse)
    assert torch.autograd.gradcheck(call, (x, u))
    assert torch.autograd.gradgradcheck(call, (x, u))
    w, b = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((5, width), (5,)))
    layer = functools.partial(rotations.householder_linear, weight=w, bias=b)
    wanted = torch.nn.functional.linear(rotations.householder(x, u, inverse=True), w, b)
    assert torch.equal(layer(x, u), wanted)
    assert torch.autograd.gradcheck(layer, (x, u))
    assert torch.autograd.gradgradcheck(layer, (x, u))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_reflections_do_not_look_at_lengths(size: float, rng: torch.Generator) -> None:
    u = torch.randint(-3, 4, (6, 4), generator=rng).float()
    u[:, 2], u[0] = 0, torch.tensor([2.0, 1.0, 0.0, -3.0])
    wanted = rotations.householder(x := torch.randn(5, 6, generator=rng), u)
    scaled = (u * size).requires_grad_()
    got = rotations.householder(x.requires_grad_(), scaled)
    assert torch.allclose(got, wanted, atol=2e-3 if size == 1e-42 else 1e-5)
    got.square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x, atol=1e-4)


def test_reflections_stay_orthogonal_under_autocast(rng: torch.Generator) -> None:
    x, u = torch.randn(9, 9, generator=rng), torch.randn(9, 4, generator=rng, requires_grad=True)
    (plain,) = torch.autograd.grad((rotations.householder(x, u) ** 3).sum(), u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rotations.householder(x, u)
    (gradient,) = torch.autograd.grad((found**3).sum(), u)
    assert torch.equal(found, rotations.householder(x, u))
    assert torch.equal(gradient, plain)


def test_kept_places_serve_autograd_after_inference() -> None:
    vector = torch.randn(2, 45, requires_grad=True)
    with torch.inference_mode():
        rotations.skew_from_vector(vector, 10)
    rotations.skew_from_vector(vector, 10).square().sum().backward()
    assert vector.grad is not None
    assert torch.allclose(vector.grad, 4 * vector)
