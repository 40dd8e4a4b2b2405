"""step.py: identities of the flow, closed forms of the losses in float64, and what one update may and may not do."""
import math

import pytest
import torch

import step
from parallel import Part
from step import (BINS, Learner, adamw, add_noise, averaged, binned, copies, dmd_loss, ema_update, first_given,
                  flow_loss, grid, guided, guided_x0, lr_at, muon, numbers, ode, place, rollout, sample, sample_t,
                  shifted, start_average, stepwise, tensors, to_x0, train_step)

SHAPE = (4, 3, 2, 4, 4)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(dtype=torch.float32):
    """x0, e, t of four samples."""
    x0, e = randn(*SHAPE, seed=1, dtype=dtype), randn(*SHAPE, seed=2, dtype=dtype)
    return x0, e, torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=dtype)


def over(t):
    """t (B,), shaped to multiply (B, C, F, H, W)."""
    return t.view(-1, 1, 1, 1, 1)


def towards(x, t, cond):
    """A net whose x0 is the condition."""
    return (x - cond) / over(t)


def wave(x, t, cond):
    """A net that is linear in its condition alone."""
    return torch.sin(x) + (0 if cond is None else cond)


# ---- the flow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_frame", [False, True])
def test_noise_and_back_is_the_identity_and_t_runs_from_data_to_noise(per_frame):
    x0, e, t = example(torch.float64)
    if per_frame:
        t = torch.stack([t, t.flip(0)], 1)
    x_t = add_noise(x0, e, t)
    assert torch.allclose(to_x0(x_t, e - x0, t), x0, atol=1e-14)
    assert torch.equal(add_noise(x0, e, torch.zeros(4)), x0)
    assert torch.equal(add_noise(x0, e, torch.ones(4)), e)
    if per_frame:
        assert torch.allclose(x_t[1, :, 1], (1 - t[1, 1]) * x0[1, :, 1] + t[1, 1] * e[1, :, 1])


def test_shift_moves_times_towards_noise_and_gives_the_known_few_step_grids():
    assert grid(4, 5) == pytest.approx([1, 0.9375, 5 / 6, 0.625], abs=1e-15)
    assert grid(4, 3) == pytest.approx([1, 0.9, 0.75, 0.5])
    assert grid(4, 8) == pytest.approx([1, 0.96, 8 / 9, 8 / 11])
    assert grid(3, 1) == pytest.approx([1, 2 / 3, 1 / 3])
    assert shifted(0.0, 5) == 0
    assert shifted(1.0, 5) == 1


def test_times_take_the_density_then_the_shift_then_the_clamp():
    u = (torch.arange(1000) + 0.5) / 1000
    t = sample_t(u, "uniform", 8.0, (0.02, 0.98))
    assert t.dtype == torch.float32
    assert t.aminmax() == (pytest.approx(0.02), pytest.approx(0.98))
    assert ((t == t.max()).float().mean() - 0.139).abs() < 0.003       # the mass that a clamp in shifted units piles up
    assert sample_t(torch.tensor([0.75]), "uniform", 5.0).item() == pytest.approx(0.9375)  # shifted once, not twice
    z = torch.logit(sample_t(u, "logit_normal", 1.0).double())
    assert z.mean().abs() < 1e-6
    assert (z.std() - 1).abs() < 0.01
    assert torch.allclose(sample_t(u, "logit_normal", 3.0), shifted(sample_t(u, "logit_normal", 1.0), 3.0), atol=1e-6)
    assert sample_t(torch.zeros(1), "logit_normal").item() == 0  # u = 0 is a legal draw
    with pytest.raises(ValueError, match="cosmap.*uniform or logit_normal"):
        sample_t(u, "cosmap")


def test_a_thousand_times_stay_a_thousand_times():
    t = sample_t((torch.arange(1000) + 0.5).float() / 1000)
    assert len(t.unique()) == 1000
    assert len(t.bfloat16().unique()) < 600


def test_guidance_is_u_plus_s_times_c_minus_u_with_a_scale_per_sample():
    def net(x, t, cond):
        return cond

    c, u = torch.full((3, 1, 1, 1, 1), 3.0), torch.full((3, 1, 1, 1, 1), 1.0)
    v, v_cond = guided(net, None, None, c, u, torch.tensor([1.0, 2.0, 4.0]))
    assert v.flatten().tolist() == [3, 5, 9]
    assert torch.equal(v_cond, c)


def test_no_scale_is_one_forward_of_the_condition():
    asked = []

    def net(x, t, cond):
        asked.append(cond)
        return torch.tensor(3.0)

    v, v_cond = guided(net, None, None, "cond", "uncond", None)
    assert v is v_cond
    assert asked == ["cond"]


def test_a_sample_of_scale_1_has_the_conditional_velocity_to_the_bit():
    c, u = randn(50, 3, 1, 2, 2, seed=3) / 3, randn(50, 3, 1, 2, 2, seed=4)

    def net(x, t, cond):
        return cond

    v, v_cond = guided(net, None, None, c, u, torch.ones(50))
    assert torch.equal(v, c)
    assert not torch.equal(u + 1 * (c - u), c)      # what arithmetic would have made of it


# ---- the losses -----------------------------------------------------------------------------------------------------


def test_flow_loss_is_zero_for_the_velocity_and_the_mean_square_otherwise():
    x0, e, t = example()

    def exact(x, t, cond):
        return e - x0

    def silent(x, t, cond):
        return torch.zeros_like(x)

    def narrow(x, t, cond):
        return x[:, :1]     # would broadcast

    assert flow_loss(exact, x0, None, t, e)[0] == 0
    loss, seen = flow_loss(silent, x0, None, t, e)
    assert loss == pytest.approx(((e - x0) ** 2).mean().item(), rel=1e-6)
    assert not seen["loss"].requires_grad
    with pytest.raises(ValueError, match="its target"):
        flow_loss(narrow, x0, None, t, e)


def test_flow_loss_weighted_by_t_squared_is_the_error_of_x0():
    x0, e, t = example(torch.float64)
    x_t = add_noise(x0, e, t)
    error = (to_x0(x_t, wave(x_t, t, None), t) - x0).square().mean().item()
    assert flow_loss(wave, x0, None, t, e, weight=t**2)[0].item() == pytest.approx(error, rel=1e-12)


def test_measurements_are_kept_apart_by_fifths_of_t():
    values, t = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.1, 0.15, 0.5, 1.0])
    a, b = binned(values[:2], t[:2]), binned(values[2:], t[2:])
    assert a.shape == (2, BINS)
    seen = numbers({"x_by": (a + b) / 2, "y": torch.tensor(2.0)})
    assert seen == {"x_by_t0": 2.0, "x_by_t2": 5.0, "x_by_t4": 7.0, "y": 2.0}


def test_measurements_of_some_samples_leave_the_others_out():
    some = torch.tensor([True, False, True])
    sums, counts = binned(torch.tensor([1.0, 3.0, 5.0]), torch.full((3, 2), 0.3), some)
    assert sums.tolist() == [0, 6, 0, 0, 0]
    assert counts.tolist() == [0, 2, 0, 0, 0]


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_dmd_gradient_is_the_closed_form_of_two_gaussians(t):
    """Unit Gaussians at mean a (student) and b (teacher): f - r = t² (a - b) / ((1 - t)² + t²) at every x_t and e."""
    a, b = 0.7, -0.4

    def field(mean):
        def net(x, t, cond):
            s = over(t)
            return (s - (1 - s)) / ((1 - s) ** 2 + s**2) * (x - (1 - s) * mean) - mean
        return net

    x0 = randn(3, 1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    e, times = randn(3, 1, 1, 2, 2, seed=5, dtype=torch.float64), torch.full((3,), t, dtype=torch.float64)
    loss, _ = dmd_loss(x0, field(b), field(a), None, None, times, e, None)
    loss.backward()
    x_t = add_noise(x0.detach(), e, times)
    r = to_x0(x_t, field(b)(x_t, times, None), times)
    n = (x0.detach() - r).abs().mean((1, 2, 3, 4), keepdim=True)
    want = t**2 * (a - b) / ((1 - t) ** 2 + t**2) / n / x0.numel()
    assert torch.allclose(x0.grad, want.expand_as(x0), rtol=1e-12, atol=0)


def dmd_grad(x0, f, r):
    """The gradient for a critic and a teacher whose x0 are the given tensors."""
    def critic(x, t, cond):
        return towards(x, t, f)

    def teacher(x, t, cond):
        return towards(x, t, r)

    x0 = x0.clone().requires_grad_()
    t, e = torch.full((len(x0),), 0.5, dtype=x0.dtype), randn(*x0.shape, seed=9, dtype=x0.dtype)
    dmd_loss(x0, teacher, critic, None, None, t, e, None)[0].backward()
    return x0.grad


def sizes(x):
    """Mean |x| of each sample."""
    return x.abs().mean((1, 2, 3, 4))


def test_the_normaliser_is_each_samples_own_and_takes_the_scale_out():
    x0, f, r = (randn(2, 1, 1, 2, 2, seed=s, dtype=torch.float64) for s in range(3))
    far = torch.stack([x0[0], 100 * x0[1]])
    alone = dmd_grad(x0[:1], f[:1], r[:1])
    assert torch.allclose(alone, 2 * dmd_grad(far, f, r)[:1], rtol=1e-6)          # a batch-wide mean would see sample 1
    assert torch.allclose(dmd_grad(10 * x0, 10 * f, 10 * r), dmd_grad(x0, f, r), rtol=1e-6)
    assert torch.allclose(sizes(dmd_grad(x0, f, r)) * x0.numel(), sizes(f - r) / sizes(x0 - r), rtol=1e-6)


def test_the_normaliser_is_guarded_where_the_student_is_at_the_teachers_x0():
    x0, f = (randn(2, 1, 1, 2, 2, seed=s, dtype=torch.float64) for s in range(2))
    grad = dmd_grad(x0, f, x0)
    assert grad.isfinite().all()
    assert grad.abs().max() * x0.numel() <= 1.01 * (f - x0).abs().max() / 1e-5


def test_the_same_net_as_teacher_and_critic_gives_no_gradient():
    x0, e, t = example()
    x0.requires_grad_()
    dmd_loss(x0, wave, wave, torch.tensor(0.3), torch.tensor(-0.2), t, e, None)[0].backward()
    assert torch.equal(x0.grad, torch.zeros_like(x0))


def test_guidance_is_the_teachers_alone_and_measured_apart():
    x0, e, t = example()
    cond, uncond, asked = torch.tensor(0.3), torch.tensor(-0.2), []

    def critic(x, t, given):
        asked.append(given)
        return wave(x, t, given)

    _, seen = dmd_loss(x0, wave, critic, cond, uncond, t, e, torch.full((4,), 4.0))
    assert asked == [cond]
    seen = numbers(seen)
    assert seen["guidance_by_t4"] == pytest.approx(3 * 0.5 * 0.95, rel=1e-4)  # (s - 1) |c - u| in x0, t = .95
    assert seen["matching_by_t4"] == 0


def test_samples_without_guidance_follow_the_conditional_teacher_and_have_no_part_in_the_cosine():
    x0, f, c, u, e = (randn(40, 3, 1, 2, 2, seed=s) for s in range(5))
    scale, t = torch.tensor([1.0] * 39 + [3.0]), torch.tensor([0.3] * 39 + [0.7])

    def critic(x, t, cond):
        return wave(x, t, f)

    r, plain = guided_x0(wave, add_noise(x0, e, t), t, c, u, scale, 0.7)
    assert torch.equal(r[:39], plain[:39])
    assert not torch.allclose(r[39], plain[39])
    _, seen = dmd_loss(x0, wave, critic, c, u, t, e, scale, 0.7)
    assert seen["guidance_by"][:, 1].tolist() == [0, 39]
    assert seen["cosine_by"][1].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_takes_back_the_contrast_that_guidance_adds_sample_by_sample(rescale):
    x0, f, c, u = (randn(2, 3, 1, 2, 2, seed=s, dtype=torch.float64).requires_grad_(s == 0) for s in range(4))
    t, e = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.zeros_like(x0)

    def critic(x, t, cond):
        return towards(x, t, f)

    dmd_loss(x0, towards, critic, c, u, t, e, torch.full((2,), 3.0), rescale)[0].backward()
    for i in range(2):
        r = u[i] + 3 * (c[i] - u[i])
        r = (1 - rescale) * r + rescale * r * c[i].std() / r.std()
        wanted = (f[i] - r) / (x0[i] - r).abs().mean() / x0.numel()
        assert torch.allclose(x0.grad[i], wanted.detach(), rtol=1e-9, atol=1e-12)


# ---- samplers -------------------------------------------------------------------------------------------------------


def gaussian(x, t, cond):
    """v of data N(0, 0.3²), whose flow map takes z to 0.3 z."""
    t = over(t)
    return (t - 0.09 * (1 - t)) / (0.09 * (1 - t)**2 + t**2) * x


@pytest.mark.parametrize("solver, order", [("euler", 1), ("ab2", 2)])
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_solvers_error_falls_with_the_step_to_its_order(solver, order, shift):
    z = randn(*SHAPE, dtype=torch.float64)
    few, many = ((ode(gaussian, z, None, grid(n, shift), solver=solver) - 0.3 * z).abs().max() for n in (160, 320))
    assert few / many == pytest.approx(2**order, rel=0.1)


def test_a_trajectory_passes_each_of_its_times_and_ends_where_the_sampler_does():
    """On the Gaussian's exact way, at the points too, by an error that falls as the step squared."""
    z, errors = randn(*SHAPE, dtype=torch.float64), []
    for n in (160, 320):
        times = grid(n, 3.0)
        points = dict(zip([*times[1:], 0.0], step.trajectory(gaussian, z, None, times, solver="ab2")))
        assert len(points) == n
        assert torch.equal(points[0.0], ode(gaussian, z, None, times, solver="ab2"))
        exact = {t: math.sqrt(0.09 * (1 - t)**2 + t**2) * z for t in (0.75, 0.5, 0.0)}
        errors.append([(points[t] - exact[t]).abs().max() for t in exact])
    for few, many in zip(*errors):
        assert few / many == pytest.approx(4, rel=0.1)


def test_flow_loss_on_a_pair_is_the_error_of_x0_at_the_points_of_its_way():
    """At t = 1 the net is asked at the pair's own noise, at a later time at that point, whatever its noise is there."""
    x0, z, point = (randn(2, *SHAPE[1:], seed=s, dtype=torch.float64) for s in range(3))
    t, asked = torch.tensor([1.0, 0.4], dtype=torch.float64), []
    x_t = torch.stack([z[0], point[1]])
    e = (x_t - over(1 - t) * x0) / over(t)

    def net(x, t, cond):
        asked.append(x)
        return wave(x, t, cond)

    loss, seen = flow_loss(net, x0, torch.tensor(0.3), t, e, t**2, times=(1.0, 0.4))
    each = (to_x0(x_t, wave(x_t, t, torch.tensor(0.3)), t) - x0).square().flatten(1).mean(1)
    assert torch.equal(asked[0][0], z[0])
    assert torch.allclose(asked[0][1], point[1], rtol=1e-12)
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-12)
    assert numbers(seen)["loss_by_t0"] == pytest.approx(each[1].item(), rel=1e-5)
    assert numbers(seen)["loss_by_t1"] == pytest.approx(each[0].item(), rel=1e-5)


def test_a_net_that_starts_again_is_its_average_and_remembers_nothing():
    p = torch.nn.Parameter(torch.ones(3, 3))
    rows = {"w": Part(p, 0, (3, 3))}
    me = Learner(rows, *adamw(rows, (0.9, 0.99), 0.0), lambda last: None, lambda: p.grad.norm(), copies(rows))
    for _ in range(2):
        train_step(me, [lambda: (p.square().sum(), {"loss": torch.zeros(())})], lr=0.1, clip=0, ema=0.9)
    average = me.average["w"].tensor.clone()
    assert not torch.equal(p, average)
    step.start_again(me, lambda rows: adamw(rows, (0.0, 0.5), 0.0))
    assert torch.equal(p, average)
    assert not any(moment.any() for moment in tensors(me.opt_rows))
    assert {group["betas"] for group in me.opt.param_groups} == {(0.0, 0.5)}
    assert me.counts == {"updates": 0, "skipped": 0, "in_a_row": 0}


def test_ab2_is_exact_where_v_is_a_straight_line_in_time_from_its_second_step_on():
    times, z = [1.0, 0.7, 0.2], randn(*SHAPE, dtype=torch.float64)
    x0 = ode(lambda x, t, cond: over(t.double()).expand_as(x), z, None, times, solver="ab2")
    first = -0.3 * 1.0                                  # Euler's, with v at t = 1
    rest = -0.7**2 / 2                                  # the integral of t from 0.7 to 0
    assert torch.allclose(x0, z + first + rest, atol=1e-6)


def test_euler_follows_the_straight_path_exactly():
    x0, e, _ = example(torch.float64)

    def straight(x, t, cond):
        return e - x0

    assert torch.allclose(ode(straight, e, None, grid(7, 3)), x0, atol=1e-12)


def test_euler_is_guided_by_its_scale_and_asks_once_a_step_where_that_is_1():
    z, asked = randn(*SHAPE), []

    def net(x, t, cond):
        asked.append(cond)
        return torch.full_like(x, cond)

    assert torch.allclose(ode(net, z, 3.0, [1.0, 0.5], 1.0, 4.0), z - 9)
    assert asked == [3.0, 1.0] * 2
    asked.clear()
    assert torch.allclose(ode(net, z, 3.0, [1.0, 0.5], 1.0, 1.0), z - 3)
    assert asked == [3.0] * 2


def few_steps(net, z, noises, times):
    """x0 of each step of the few-step sampler, by hand."""
    x, seen = z, []
    for k, t in enumerate(times):
        t = torch.full((len(z),), t)
        seen.append(to_x0(x, net(x, t, None), t))
        if k + 1 < len(times):
            x = add_noise(seen[-1], noises[k], torch.full((len(z),), times[k + 1]))
    return seen


def test_rollout_is_the_sampler_up_to_its_exit_where_alone_it_keeps_a_graph():
    z, noises, times = randn(*SHAPE), [randn(*SHAPE, seed=s) for s in (5, 6, 7)], grid(4, 5)
    w, calls = torch.tensor(0.5, requires_grad=True), []

    def net(x, t, cond):
        calls.append((t.dtype, t[0].item(), torch.is_grad_enabled()))
        return w * x + over(t)

    with torch.no_grad():
        by_hand = few_steps(net, z, noises, times)
    for exit in range(4):
        calls.clear()
        x0 = rollout(net, z, None, times, noises, exit)
        assert torch.equal(x0.detach(), by_hand[exit])      # exit 3: returned clean, not re-noised
        assert calls == [(torch.float32, pytest.approx(times[k]), k == exit) for k in range(exit + 1)]

    x0.square().sum().backward()
    last = add_noise(by_hand[2], noises[2], torch.full((4,), times[3]))
    v = torch.tensor(0.5, requires_grad=True)
    to_x0(last, v * last + 0.625, torch.full((4,), 0.625)).square().sum().backward()
    assert w.grad == pytest.approx(v.grad.item(), rel=1e-5)
    with torch.no_grad():
        assert not rollout(net, z, None, times, noises, 3).requires_grad


def test_a_checkpoints_sampler_is_a_students_few_steps_or_a_teachers_guided_many():
    noises, times = [randn(*SHAPE, seed=s) for s in range(3)], [1.0, 0.9, 0.5]
    cond, uncond = torch.tensor(0.3), torch.tensor(-0.2)
    few = sample(wave, noises.__getitem__, cond, uncond, {"sampler": "rollout", "times": times, "guidance": 1.0})
    assert torch.equal(few, rollout(wave, noises[0], cond, times, noises[1:], 2))
    how = {"sampler": "euler", "steps": 5, "shift": 3.0, "guidance": 2.0}
    many = sample(wave, noises.__getitem__, cond, uncond, how)
    assert torch.equal(many, ode(wave, noises[0], cond, grid(5, 3.0), uncond, 2.0))
    second_order = sample(wave, noises.__getitem__, cond, uncond, how | {"solver": "ab2"})
    assert torch.equal(second_order, ode(wave, noises[0], cond, grid(5, 3.0), uncond, 2.0, "ab2"))
    assert not torch.equal(second_order, many)


# ---- frames that are given ------------------------------------------------------------------------------------------


FREE = torch.tensor([[0.0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1]])


def test_a_first_frame_is_given_where_it_is_said_and_never_that_of_a_still():
    given = torch.tensor([True, False, True, False])
    x0, z = randn(4, 3, 3, 4, 4, seed=1), randn(4, 3, 3, 4, 4, seed=2)
    free = first_given(x0, given)
    assert free.tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]]
    begun = place(z, x0, free)
    assert torch.equal(begun[given][:, :, 0], x0[given][:, :, 0])
    assert torch.equal(begun[~given], z[~given])
    assert torch.equal(begun[given][:, :, 1:], z[given][:, :, 1:])
    assert first_given(x0[:, :, :1], given) is None
    assert torch.equal(place(z, x0, None), z)


def by_frame(x, t, cond):
    """A net whose frames do not see each other: what is given might as well not be there."""
    t = t.view(len(t), 1, -1, 1, 1)
    return torch.sin(3 * x) + t + 1 + (0 if cond is None else cond)


def three_frames(dtype=torch.float64):
    return [randn(4, 3, 3, 4, 4, seed=s, dtype=dtype) for s in (1, 2)] + [torch.tensor([0.1, 0.4, 0.7, 0.95])]


def left(x, i):
    """Clip i without its given frames."""
    return x[i:i + 1, :, FREE[i].bool()]


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2, 3, 1]), torch.rand(4, 3)])
def test_flow_loss_of_a_clip_is_the_one_of_its_free_frames(weight):
    x0, e, t = three_frames()
    loss, seen = flow_loss(by_frame, x0, None, t, e, weight, FREE)
    alone = []
    for i in range(4):
        w = weight
        if weight is not None:
            w = weight[i:i + 1] if weight.ndim == 1 else weight[i:i + 1, FREE[i].bool()]
        alone.append(flow_loss(by_frame, left(x0, i), None, t[i:i + 1], left(e, i), w))
    assert loss.item() == pytest.approx(sum(loss.item() for loss, _ in alone) / 4, rel=1e-6)
    assert torch.allclose(seen["loss_by"], sum(seen["loss_by"] for _, seen in alone), rtol=1e-6)


def test_flow_loss_asks_at_0_where_a_frame_is_given_as_it_is():
    x0, e, t = three_frames(torch.float32)
    asked = []

    def net(x, t, cond):
        asked.extend([x, t])
        return x

    flow_loss(net, x0, None, t, e, free=FREE)
    assert torch.equal(asked[1], t[:, None] * FREE)
    assert torch.equal(asked[0].movedim(2, 1)[FREE == 0], x0.movedim(2, 1)[FREE == 0])
    assert torch.equal(asked[0].movedim(2, 1)[FREE == 1], add_noise(x0, e, t).movedim(2, 1)[FREE == 1])


def test_times_per_frame_are_given_0_too_and_each_free_frame_is_measured_at_its_own():
    x0, e, _ = three_frames()
    t = torch.tensor([[0.9, 0.3, 0.3]] * 4)
    asked = []

    def net(x, t, cond):
        asked.append(t)
        return x

    _, seen = flow_loss(net, x0, None, t, e, free=FREE)
    assert torch.equal(asked[0], t * FREE)
    free = [FREE[:, 0].sum(), FREE[:, 1:].sum()]
    assert seen["loss_by"][1].tolist() == [0, free[1], 0, 0, free[0]]
    assert seen["loss_by"][0].sum() / seen["loss_by"][1].sum() == pytest.approx(
        ((x0 - add_noise(x0, e, t * FREE) - e + 2 * add_noise(x0, e, t * FREE)).square().mean((1, 3, 4)) * FREE).sum()
        / FREE.sum())


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_dmd_of_a_clip_is_the_one_of_its_free_frames(rescale):
    x0, e, t = three_frames()
    f, c, u = (randn(4, 3, 3, 4, 4, seed=s, dtype=torch.float64) for s in (3, 4, 5))
    scale = torch.tensor([2.0, 3, 1, 4])

    def lost(x0, e, t, f, c, u, scale, free):
        x0 = x0.clone().requires_grad_()
        loss, seen = dmd_loss(x0, by_frame, lambda x, t, cond: by_frame(x, t, f), c, u, t, e, scale, rescale, free)
        loss.backward()
        return loss.item(), x0.grad, seen

    loss, grad, seen = lost(x0, e, t, f, c, u, scale, FREE)
    alone = []
    for i in range(4):
        one = slice(i, i + 1)
        alone.append(lost(left(x0, i), left(e, i), t[one], left(f, i), left(c, i), left(u, i), scale[one], None))
        assert torch.allclose(left(grad, i), alone[i][1] / 4, rtol=3e-3, atol=1e-9)     # stds of n, not n - 1
    assert grad.movedim(2, 1)[FREE == 0].abs().max() == 0
    assert loss == pytest.approx(sum(loss for loss, _, _ in alone) / 4, rel=1e-3)
    for name in ("loss", "x0_mean"):
        assert seen[name].item() == pytest.approx(sum(seen[name] for _, _, seen in alone).item() / 4, rel=1e-3)
    for name in ("matching_by", "guidance_by", "cosine_by", "normaliser_by"):
        assert torch.allclose(seen[name], sum(seen[name] for _, _, seen in alone), rtol=3e-3)
    spread = sum((left(x0, i) - seen["x0_mean"]).square().mean() for i in range(4)) / 4
    assert seen["x0_std"].item() == pytest.approx(spread.sqrt().item(), rel=1e-6)


def test_teacher_and_critic_see_given_frames_as_they_are_at_0():
    x0, e, t = three_frames(torch.float32)
    asked = []

    def net(x, t, cond):
        asked.append((x, t))
        return x

    dmd_loss(x0, net, net, 1, 0, t, e, torch.full((4,), 2.0), 0.6, FREE)
    assert len(asked) == 3
    for x, seen in asked:
        assert torch.equal(x.movedim(2, 1)[FREE == 0], x0.movedim(2, 1)[FREE == 0])
        assert torch.equal(seen, t[:, None] * FREE)


def test_losses_with_all_frames_free_are_the_ones_without_the_argument():
    x0, e, t = three_frames()
    ones = torch.ones_like(FREE)
    assert flow_loss(by_frame, x0, None, t, e, free=ones)[0] == pytest.approx(flow_loss(by_frame, x0, None, t, e)[0])
    for free in (None, ones):
        loss, seen = dmd_loss(x0, by_frame, wave, e, 0, t, e, torch.full((4,), 2.0), 0.6, free)
        if free is None:
            wanted = loss, seen
    assert loss.item() == pytest.approx(wanted[0].item(), rel=1e-5)
    assert numbers(seen) == pytest.approx(numbers(wanted[1]), rel=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["euler", "ab2", "rollout"])
def test_samplers_leave_given_frames_as_they_are_to_the_bit_and_ask_at_0_there(sampler, guidance):
    given, asked = randn(4, 3, 3, 4, 4, seed=9), []

    def net(x, t, cond):
        asked.append((x, t))
        return by_frame(x, t, cond)

    if sampler == "rollout":
        sampling = {"sampler": sampler, "times": [1.0, 0.8, 0.3]}
    else:
        sampling = {"sampler": "euler", "solver": sampler, "steps": 3, "shift": 2.0, "guidance": guidance}

    def draw(k):
        return randn(4, 3, 3, 4, 4, seed=20 + k)

    x0 = sample(net, lambda k: draw(k) if k else place(draw(0), given, FREE), 0.3, None, sampling, FREE)
    for x, t in [*asked, (x0, 0 * FREE)]:
        assert torch.equal(x.movedim(2, 1)[FREE == 0], given.movedim(2, 1)[FREE == 0])
        assert t.shape == FREE.shape
        assert not t[FREE == 0].any()
    plain = sample(by_frame, draw, 0.3, None, sampling)
    assert torch.equal(x0.movedim(2, 1)[FREE == 1], plain.movedim(2, 1)[FREE == 1])


# ---- chunk by chunk --------------------------------------------------------------------------------------------------


def past_and(log):
    """A net's `see`: a condition is a list of what it has seen; what is seen, and with what gradient, goes into log."""
    def see(cond, x0):
        log.append((torch.is_grad_enabled(), x0))
        return [*cond, x0]
    return see


def test_a_clip_is_made_chunk_by_chunk_each_after_what_both_conditions_have_seen_of_those_before():
    z, more = randn(2, 3, 5, 2, 2, seed=1), randn(2, 3, 5, 2, 2, seed=2)
    log, asked = [], []

    def draw(cond, uncond, free, z, more):
        asked.append((list(cond), list(uncond), z, more))
        return z + 10 * more

    x0 = stepwise(draw, past_and(log), (["c"], ["u"]), 2, z, more)
    assert torch.equal(x0, z + 10 * more)
    chunks = x0.split(2, 2)
    for i, (cond, uncond, part, _) in enumerate(asked):
        assert torch.equal(part, z.split(2, 2)[i])
        assert cond[0] == "c"
        assert uncond[0] == "u"
        assert len(cond) == len(uncond) == 1 + i
        assert all(torch.equal(a, b) for a, b in zip(cond[1:], chunks))
    assert len(log) == 2 * 2    # the last chunk has nobody to see it
    assert not any(grad for grad, _ in log)


@pytest.mark.parametrize("sampling", [
    {"sampler": "euler", "steps": 3, "shift": 1.0, "guidance": 2.0, "tile": [2, 9, 9]},
    {"sampler": "rollout", "times": [1.0, 0.5], "guidance": 1.0, "tile": [2, 9, 9]}], ids=("many", "few"))
def test_sample_makes_each_chunk_by_its_own_sampler_and_guides_it_by_what_each_condition_saw(sampling):
    """The net's v is its condition, which grows by 1 for each chunk seen; where nobody asks for null, it sees none."""
    noises, seen = [randn(4, 3, 5, 2, 2, seed=k) for k in range(4)], []
    x0 = sample(lambda x, t, cond: cond + 0 * x, noises.__getitem__, torch.tensor(0.0), torch.tensor(0.0), sampling,
                see=lambda cond, x0: seen.append(x0) or cond + 1)
    for i, part in enumerate(x0.split(2, 2)):
        z, e = (noise.split(2, 2)[i] for noise in noises[:2])
        want = z - i
        if sampling["sampler"] == "rollout":
            want = add_noise(want, e, torch.full((4,), 0.5)) - 0.5 * i
        torch.testing.assert_close(part, want)
    assert len(seen) == 2 * sampling["guidance"]


def test_a_first_frame_given_to_a_chunk_stays_to_the_bit_and_its_net_is_asked_at_0_there():
    sampling, asked = {"sampler": "rollout", "times": [1.0, 0.5], "guidance": 1.0, "tile": [2, 9, 9]}, []
    free, given = torch.ones(4, 5), randn(4, 3, 5, 2, 2, seed=9)
    free[:, 0] = 0

    def net(x, t, cond):
        asked.append(t)
        return x.sin()

    x0 = sample(net, lambda k: randn(4, 3, 5, 2, 2, seed=k) if k else place(randn(4, 3, 5, 2, 2), given, free),
                torch.tensor(0.0), None, sampling, free, see=lambda cond, x0: cond)
    assert torch.equal(x0[:, :, 0], given[:, :, 0])
    assert not (x0[:, :, 1:] == given[:, :, 1:]).any()
    assert asked[0].tolist() == [[0, 1]] * 4
    assert asked[2].tolist() == [[1, 1]] * 4


def test_the_gradient_of_a_chunk_goes_through_its_own_draw_alone():
    w = torch.tensor(2.0, requires_grad=True)
    z = torch.ones(1, 1, 3, 1, 1)
    seen = []

    def see(cond, x0):
        seen.append(x0)
        return cond + (x0 * w).sum()

    x0 = stepwise(lambda cond, free, z: z * w + cond, see, (torch.tensor(0.0),), 1, z)
    assert x0.flatten().tolist() == [2, 2 + 4, 2 + 4 + 12]
    x0.sum().backward()
    assert w.grad == 3


# ---- the step -------------------------------------------------------------------------------------------------------


class Small:
    """A learner of one matrix and one bias, and closures over parts of a batch: parallel.py's work done by hand."""

    def __init__(self, seed=0):
        self.rows = {"w": Part(randn(3, 2, seed=seed), 0, (3, 2)), "bias": Part(randn(3, seed=seed + 1), 0, (3,))}
        self.leaves = {name: part.tensor.detach().requires_grad_() for name, part in self.rows.items()}
        opt, opt_rows = adamw(self.rows, (0.9, 0.99), 0.1)
        self.synced, self.me = [], None
        self.me = Learner(self.rows, opt, opt_rows, self.synced.append, self.norm, copies(self.rows))

    def norm(self):
        for name, leaf in self.leaves.items():
            self.rows[name].tensor.grad, leaf.grad = leaf.grad, None
        grads = [tensor.grad for tensor in tensors(self.rows) if tensor.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def losses(self, batch, parts=1):
        def loss_of(x):
            def loss():
                value = (x @ self.leaves["w"].T + self.leaves["bias"]).square().mean()
                return value, {"loss": value.detach()}
            return loss
        return [loss_of(x) for x in batch.chunk(parts)]

    def step(self, batch, parts=1, lr=0.1, clip=1.0, ema=0.9):
        return train_step(self.me, self.losses(batch, parts), lr=lr, clip=clip, ema=ema)

    def state(self):
        """Everything that an update may change."""
        parts = [*self.rows.values(), *self.me.opt_rows.values(), *self.me.average.values()]
        return [part.tensor.clone() for part in parts]


NAN = torch.tensor([[math.nan, 1.0]])


def test_four_micro_batches_are_one_batch_and_only_the_last_syncs():
    one, four, batch = Small(), Small(), randn(8, 2, seed=3)
    a, b = one.step(batch), four.step(batch, parts=4)
    assert one.synced == [True]
    assert four.synced == [False, False, False, True]
    assert a["loss"] == pytest.approx(b["loss"].item(), rel=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"].item(), rel=1e-6)
    assert torch.allclose(one.rows["w"].tensor, four.rows["w"].tensor, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.01, 1.0, 1e9])
def test_clipping_is_torchs_own_and_zero_means_off(clip):
    small, reference, batch, kept = Small(), Small(), randn(8, 2), []
    small.me.opt.register_step_pre_hook(lambda *_: kept.extend(x.grad.clone() for x in tensors(small.rows)))
    seen = small.step(batch, clip=clip)
    for loss_of in reference.losses(batch):
        loss_of()[0].backward()
    leaves = list(reference.leaves.values())
    norm = torch.nn.utils.clip_grad_norm_(leaves, clip or math.inf)
    assert torch.equal(seen["grad_norm"], norm)
    assert all(torch.equal(grad, leaf.grad) for grad, leaf in zip(kept, leaves, strict=True))


def test_a_norm_that_is_not_finite_changes_nothing_to_the_bit_and_is_counted():
    small = Small()
    small.step(randn(2, 2))                     # moments, average and step counts that are not 0
    before = small.state()
    seen = small.step(NAN)
    assert not seen["grad_norm"].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, small.state(), strict=True))
    assert small.me.counts == {"updates": 1, "skipped": 1, "in_a_row": 1}
    assert all(x.grad is None for x in tensors(small.rows))


def test_after_an_update_that_was_skipped_the_next_goes_on_as_if_it_had_not_been():
    skipping, plain = Small(), Small()
    for batch in (randn(2, 2, seed=1), NAN, randn(2, 2, seed=2)):
        skipping.step(batch)
    for batch in (randn(2, 2, seed=1), randn(2, 2, seed=2)):
        plain.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(plain.state(), skipping.state(), strict=True))
    assert skipping.me.counts == {"updates": 2, "skipped": 1, "in_a_row": 0}


def test_too_many_updates_skipped_in_a_row_are_an_error(monkeypatch):
    monkeypatch.setattr(step, "SKIPS", 3)
    small = Small()
    for batch in (NAN, NAN, randn(2, 2), NAN, NAN):
        small.step(batch)
    with pytest.raises(RuntimeError, match="3 updates in a row held NaN"):
        small.step(NAN)
    assert small.me.counts == {"updates": 1, "skipped": 5, "in_a_row": 3}


def test_a_loss_that_does_not_depend_on_what_is_trained_is_an_error():
    small, elsewhere = Small(), torch.ones((), requires_grad=True)

    def norm():
        return torch.zeros(())

    def loss():
        return elsewhere.square(), {"loss": torch.zeros(())}

    small.me.norm = norm
    before = small.state()
    with pytest.raises(RuntimeError, match="no trained tensor has a gradient"):
        train_step(small.me, [loss], lr=0.1, clip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, small.state(), strict=True))


def test_what_has_no_gradient_beside_something_that_has_stays():
    small = Small()

    def loss():
        value = small.leaves["w"].square().sum()
        return value, {"loss": value.detach()}

    before = small.rows["bias"].tensor.clone()
    train_step(small.me, [loss], lr=0.1, clip=1.0)
    assert torch.equal(small.rows["bias"].tensor, before)


def test_a_groups_learning_rate_is_its_scale_times_the_runs():
    small = Small()
    matrices, others = small.me.opt.param_groups
    others["scale"] = 0.0
    before = {name: part.tensor.clone() for name, part in small.rows.items()}
    small.step(randn(4, 2), lr=0.3)
    assert (matrices["lr"], others["lr"]) == (0.3, 0.0)
    assert torch.equal(small.rows["bias"].tensor, before["bias"])
    assert not torch.equal(small.rows["w"].tensor, before["w"])


class Told(torch.Tensor):
    """A number that tells when it, or what is made of it, is waited for."""
    waits = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy", "cpu"):
            cls.waits.append(name)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("batch", [randn(2, 2), NAN], ids=["finite", "not finite"])
def test_the_device_is_waited_for_once_after_the_optimizer_has_been_queued(batch, monkeypatch):
    small, norm = Small(), None
    monkeypatch.setattr(Told, "waits", events := [])
    norm = small.me.norm
    small.me.norm = lambda: norm().as_subclass(Told)
    small.me.opt.register_step_post_hook(lambda *_: events.append("step"))
    small.step(batch)
    assert events == ["step", "item"]


def test_adamw_decays_matrices_alone_and_its_state_is_there_from_the_start():
    rows = {name: Part(torch.ones(shape), 0, shape) for name, shape in
            (("w", (2, 2)), ("bias", (2,)), ("blocks.0.modulation", (1, 6, 2)))}
    opt, state = adamw(rows, (0.9, 0.99), 0.5)
    assert set(state) == {f"{name}.{kind}" for name in rows for kind in ("step", "exp_avg", "exp_avg_sq")}
    for tensor in tensors(rows):
        tensor.grad = torch.zeros_like(tensor)
    for group in opt.param_groups:
        group["lr"] = 0.1
    opt.step()
    assert torch.allclose(rows["w"].tensor, torch.tensor(0.95))
    assert (rows["bias"].tensor == 1).all()
    assert (rows["blocks.0.modulation"].tensor == 1).all()
    assert state["w.step"].tensor == 1  # the very tensors that the optimizer uses


def test_adamw_of_a_shard_knows_its_place_and_which_parameter_is_a_matrix():
    """A rank may hold a single row, or none, of a matrix: what is decayed follows the whole one's shape."""
    rows = {"w": Part(torch.ones(0, 4), 8, (8, 4)), "bias": Part(torch.ones(1), 3, (5,))}
    opt, state = adamw(rows, (0.9, 0.99), 0.5)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.5, 0.0]
    assert (state["w.exp_avg"].first, state["w.exp_avg"].shape) == (8, (8, 4))
    assert (state["bias.exp_avg_sq"].first, state["bias.exp_avg_sq"].shape) == (3, (5,))
    assert (state["w.step"].first, state["w.step"].shape) == (0, ())


# ---- muon -----------------------------------------------------------------------------------------------------------

# two pairs of one shape, a wide one, and what AdamW updates
KINDS = {"blocks.0.q": (12, 8), "blocks.1.q": (12, 8), "blocks.0.ffn": (6, 20), "blocks.0.bias": (8,),
         "blocks.0.modulation": (1, 6, 8), "head": (5, 8)}
MUONS = ("blocks.0.q", "blocks.1.q", "blocks.0.ffn")


def stacked(parts, rows):
    """What gathers on one rank."""
    assert all(len(part) == rows for part in parts)
    return torch.stack(parts)


def grown(updates, lr=0.1, decay=0.5, bad=(), rows=None):
    """Rows after so many updates of Muon, the gradients drawn by number -> rows, state, optimizer."""
    if rows is None:
        rows = {name: Part(randn(*shape, seed=i), 0, shape) for i, (name, shape) in enumerate(KINDS.items())}
    opt, state = muon(rows, (0.9, 0.99), decay, stacked)
    for n in range(updates):
        update(opt, rows, n, lr, n in bad)
    return rows, state, opt


def update(opt, rows, n, lr, bad=False):
    for i, part in enumerate(rows.values()):
        g = randn(*part.shape, seed=100 * n + i)
        part.tensor.grad = g * math.nan if bad else g
    for group in opt.param_groups:
        group["lr"] = lr * group["scale"]
    opt.found_inf = torch.tensor(float(bad))
    opt.step()
    opt.zero_grad()


def by_hand(name, updates, lr=0.1, decay=0.5):
    """One matrix by the paper's formulas, in float64 and with loops."""
    i = list(KINDS).index(name)
    w = randn(*KINDS[name], seed=i).double()
    m = torch.zeros_like(w)
    for n in range(updates):
        g = randn(*KINDS[name], seed=100 * n + i).double()
        m = 0.95 * m + 0.05 * g
        x = 0.05 * g + 0.95 * m             # Nesterov: momentum as it will be
        x = x / x.square().sum().sqrt()
        for a, b, c in step.QUINTICS:
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        w = w * (1 - lr * decay) - lr * 0.2 * max(w.shape)**0.5 * x
    return w


@pytest.mark.parametrize("name", MUONS)
def test_muon_is_its_formulas_in_float64(name):
    rows, _, _ = grown(4)
    wanted = by_hand(name, 4)
    assert (rows[name].tensor - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", MUONS)
def test_muon_is_torchs_own_with_its_coefficients_to_what_bf16_leaves(name, monkeypatch):
    monkeypatch.setattr(step, "QUINTICS", ((3.4445, -4.7750, 2.0315),) * 5)
    rows, _, _ = grown(4)
    i = list(KINDS).index(name)
    p = torch.nn.Parameter(randn(*KINDS[name], seed=i))
    theirs = torch.optim.Muon([p], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for n in range(4):
        p.grad = randn(*KINDS[name], seed=100 * n + i)
        theirs.step()
    moved = p.detach() - randn(*KINDS[name], seed=i)
    assert (rows[name].tensor - p.detach()).norm() <= 3e-2 * moved.norm()


def test_muon_leaves_to_adamw_what_is_no_matrix_of_a_block():
    rows, state, _ = grown(3)
    mine = {name: Part(randn(*shape, seed=i), 0, shape) for i, (name, shape) in enumerate(KINDS.items())}
    opt, moments = adamw({name: mine[name] for name in KINDS if name not in MUONS}, (0.9, 0.99), 0.5)
    opt.zero_grad(set_to_none=True)
    for n in range(3):
        update(opt, mine, n, 0.1)
    for name in set(KINDS) - set(MUONS):
        assert torch.equal(rows[name].tensor, mine[name].tensor)
    assert set(state) == set(moments) | {f"{name}.momentum" for name in MUONS}


def test_muons_update_that_is_not_finite_changes_nothing_to_the_bit():
    rows, state, opt = grown(2)
    before = [part.tensor.clone() for part in [*rows.values(), *state.values()]]
    update(opt, rows, 2, 0.1, bad=True)
    after = [part.tensor for part in [*rows.values(), *state.values()]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(part.tensor.grad is None for part in rows.values())


def test_muon_goes_on_from_its_state():
    whole, _, _ = grown(4)
    rows, state, _ = grown(2)
    opt, fresh = muon(rows, (0.9, 0.99), 0.5, stacked)
    for name, part in fresh.items():
        part.tensor.copy_(state[name].tensor)
    for n in (2, 3):
        update(opt, rows, n, 0.1)
    assert all(torch.equal(rows[name].tensor, whole[name].tensor) for name in KINDS)


def test_muon_takes_adapters_all_of_which_are_matrices_and_one_matrix_at_a_time(monkeypatch):
    wanted, _, _ = grown(2)
    monkeypatch.setattr(step.Muon, "AT_ONCE", 1)
    rows = {name: Part(randn(*KINDS[name], seed=list(KINDS).index(name)), 0, KINDS[name]) for name in KINDS}
    one_by_one, _, _ = grown(2, rows=rows)
    for name in MUONS:
        assert torch.allclose(one_by_one[name].tensor, wanted[name].tensor, atol=1e-6)
    _, state, _ = grown(1, rows={"blocks.0.q": Part(randn(12, 8), 0, (12, 8))})
    assert set(state) == {"blocks.0.q.momentum"}


def test_a_matrix_without_a_gradient_stays_as_it_is():
    rows, _, opt = grown(1)
    kept = rows["blocks.0.q"].tensor.clone()
    for name in MUONS[1:]:
        rows[name].tensor.grad = torch.ones(KINDS[name])
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    assert torch.equal(rows["blocks.0.q"].tensor, kept)
    assert not torch.equal(rows["blocks.1.q"].tensor, kept)


@pytest.mark.parametrize("shape", [(2, 16, 40), (2, 40, 16), (2, 16, 16)])
def test_singular_values_from_a_hundredth_of_the_norm_on_are_brought_near_one(shape):
    q, _, p = torch.linalg.svd(randn(*shape), full_matrices=False)
    s = torch.logspace(0, -2, 16)
    s = s / s.norm()            # the least of them is .0052
    found = torch.linalg.svdvals(step.orthogonal(5 * (q * s) @ p))
    assert found[:, :13].min() > 0.7
    assert found.max() < 1.3


def test_learning_rate_at_its_corners():
    def at(n, schedule):
        return lr_at(n, lr=2.0, warmup=4, decay_steps=12, schedule=schedule)

    assert [at(n, "constant") for n in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert [at(n, "cosine") for n in (4, 8, 12, 99)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert [at(n, "linear") for n in (4, 10, 12)] == pytest.approx([2.0, 0.5, 0.0])
    assert lr_at(0, lr=1.0, warmup=0, decay_steps=10, schedule="cosine") == 1.0
    assert lr_at(9, lr=1.0, warmup=2, decay_steps=None, schedule="constant") == 1.0


# ---- the average ----------------------------------------------------------------------------------------------------


def learner(tensor, average):
    rows = {"w": Part(tensor, 0, tuple(tensor.shape))}
    return Learner(rows, None, {}, None, None, {"w": Part(average, 0, tuple(average.shape))})


def test_the_average_warms_up():
    me = learner(torch.ones(3), torch.zeros(3))
    me.counts["updates"] = 1
    ema_update(me, 0.999)
    assert torch.allclose(me.average["w"].tensor, torch.tensor(1 - 2 / 11))
    me.counts["updates"] = 10**6
    ema_update(me, 0.1)
    assert torch.allclose(me.average["w"].tensor, torch.tensor(0.1 * (1 - 2 / 11) + 0.9))


def test_an_update_counts_before_it_is_averaged_and_without_a_decay_is_not():
    small, still, batch = Small(), Small(), randn(4, 2)
    first = small.rows["w"].tensor.clone()
    small.step(batch)                           # n = 1: a decay of 2 / 11
    want = first.lerp(small.rows["w"].tensor, 1 - 2 / 11)
    assert torch.allclose(small.me.average["w"].tensor, want, atol=1e-7)
    still.step(batch, ema=None)
    assert torch.equal(still.me.average["w"].tensor, first)


def test_the_average_starts_as_the_net_with_tensors_of_its_own():
    rows = {"w": Part(randn(5), 3, (9,))}
    average = copies(rows)
    assert (average["w"].first, average["w"].shape) == (3, (9,))
    rows["w"].tensor.zero_()
    assert average["w"].tensor.abs().max() > 0
    start_average(Learner(rows, None, {}, None, None, average))
    assert torch.equal(average["w"].tensor, torch.zeros(5))


def test_the_average_is_swapped_in_and_out_to_the_bit_even_on_an_exception():
    me = learner(randn(5), randn(5, seed=1))
    net, average = me.rows["w"].tensor.clone(), me.average["w"].tensor.clone()
    with pytest.raises(KeyboardInterrupt):
        with averaged(me):
            assert torch.equal(me.rows["w"].tensor, average)
            raise KeyboardInterrupt
    assert torch.equal(me.rows["w"].tensor, net)
    assert torch.equal(me.average["w"].tensor, average)


# ---- an expert's part of the times ----------------------------------------------------------------------------------

DRAWS = 100_000


@pytest.mark.parametrize("b", (0.875, 0.9))
@pytest.mark.parametrize("density", ("uniform", "logit_normal"))
@pytest.mark.parametrize("shift", (1.0, 5.0, 12.0))
@pytest.mark.parametrize("expert", ("high", "low"))
def test_an_experts_times_are_its_part_of_the_whole_law(expert, shift, density, b):
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    t = step.sample_t(u, density, shift, part=(b, expert))
    edge = torch.tensor(b, dtype=torch.float32)
    assert ((t >= edge) == (expert == "high")).all()        # nothing outside

    # its density is that of the whole law there: the same quantiles
    whole = step.sample_t(u, density, shift)
    own = whole[(whole >= edge) == (expert == "high")]
    places = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    want, got = (x.double().quantile(places) for x in (own, t))
    assert (want - got).abs().max() < 2e-3 * (1 - b if expert == "high" else b)
    assert abs(len(own) / DRAWS - (1 - step.share_below(b, density, shift) if expert == "high"
                                   else step.share_below(b, density, shift))) < 2 / DRAWS


def test_the_share_of_the_high_expert_is_the_tables():
    shares = [1 - step.share_below(0.875, "uniform", shift) for shift in (1.0, 3.0, 5.0, 12.0)]
    assert shares == pytest.approx([0.125, 0.3, 0.417, 0.632], abs=1e-3)


def test_an_experts_strata_stay_strata():
    for expert in ("high", "low"):
        u = (torch.arange(64) + torch.rand(64, generator=torch.Generator().manual_seed(0))) / 64
        t = step.sample_t(u, "uniform", 5.0, part=(0.875, expert)).double()
        edges = step.sample_t(torch.arange(64) / 64, "uniform", 5.0, part=(0.875, expert)).double()
        assert (t >= edges).all()
        assert (t[:-1] <= edges[1:]).all()


def test_times_at_the_very_edge_fall_to_their_own_expert():
    for b in (0.875, 0.9):
        edge = torch.tensor(b, dtype=torch.float32)
        below = torch.nextafter(edge, torch.zeros(()))
        almost = torch.tensor([1 - 2**-24])
        assert step.sample_t(torch.zeros(1), part=(b, "high")) >= edge
        assert step.sample_t(almost, part=(b, "low")) <= below
        assert step.is_high(edge.item(), b)
        assert step.is_high(b, b)
        assert not step.is_high(below.item(), b)


def test_each_expert_has_its_own_guidance_scale():
    times = step.grid(4, 5.0)
    assert step.scales_at(times, (4.0, 3.0), 0.875) == [4.0, 4.0, 3.0, 3.0]
    assert step.scales_at(times, 2.0, None) == [2.0] * 4
    assert step.scales_at([0.9], [4.0, 3.0], 0.9) == [4.0]


def test_a_sampler_is_guided_at_each_time_by_its_scale():
    z = torch.ones(2, 1, 1, 1, 1)
    net = lambda x, t, cond: torch.full_like(x, cond)     # noqa: E731
    times = [1.0, 0.6, 0.5]
    got = step.ode(net, z, 2.0, times, 1.0, [3.0, 1.0, 0.5])
    v = [1 + 3 * 1, 2, 1 + 0.5 * 1]
    assert torch.allclose(got, z - 0.4 * v[0] - 0.1 * v[1] - 0.5 * v[2])
