"""step.py: identities of the flow, closed forms of the losses in float64, and what one optimizer step may and may not do."""
import pytest
import torch
from step import (BINS, add_noise, adamw, by_t, dmd_loss, ema_update, ema_weights, euler, flow_loss, grid, guided,
                  guided_x0, lr_at, rollout, sample_t, shifted, to_x0, train_step, unfold)

SHAPE = (4, 3, 2, 4, 4)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(dtype=torch.float32):
    return randn(*SHAPE, seed=1, dtype=dtype), randn(*SHAPE, seed=2, dtype=dtype), torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=dtype)


# ---- the flow


@pytest.mark.parametrize("per_frame", [False, True])
def test_noise_and_back_is_the_identity_and_t_runs_from_data_to_noise(per_frame):
    x0, e, t = example(torch.float64)
    if per_frame:
        t = torch.stack([t, t.flip(0)], 1)
    assert torch.allclose(to_x0(add_noise(x0, e, t), e - x0, t), x0, atol=1e-14)
    assert torch.equal(add_noise(x0, e, torch.zeros(4)), x0) and torch.equal(add_noise(x0, e, torch.ones(4)), e)
    if per_frame:
        assert torch.allclose(add_noise(x0, e, t)[1, :, 1], (1 - t[1, 1]) * x0[1, :, 1] + t[1, 1] * e[1, :, 1])


def test_shift_moves_times_towards_noise_and_gives_the_known_few_step_grids():
    assert grid(4, 5) == pytest.approx([1, 0.9375, 5 / 6, 0.625], abs=1e-15)
    assert grid(4, 3) == pytest.approx([1, 0.9, 0.75, 0.5]) and grid(4, 8) == pytest.approx([1, 0.96, 8 / 9, 8 / 11])
    assert grid(3, 1) == pytest.approx([1, 2 / 3, 1 / 3])
    assert shifted(0.0, 5) == 0 and shifted(1.0, 5) == 1


def test_times_take_the_density_then_the_shift_then_the_clamp():
    u = (torch.arange(1000) + 0.5) / 1000
    t = sample_t(u, "uniform", 8.0, (0.02, 0.98))
    assert t.dtype == torch.float32 and t.min() == pytest.approx(0.02) and t.max() == pytest.approx(0.98)
    assert ((t == t.max()).float().mean() - 0.139).abs() < 0.003       # the mass that a clamp in shifted units piles up
    assert sample_t(torch.tensor([0.75]), "uniform", 5.0).item() == pytest.approx(0.9375)  # shifted once, not twice
    z = torch.logit(sample_t(u, "logit_normal", 1.0).double())
    assert z.mean().abs() < 1e-6 and (z.std() - 1).abs() < 0.01
    assert torch.allclose(sample_t(u, "logit_normal", 3.0), shifted(sample_t(u, "logit_normal", 1.0), 3.0), atol=1e-6)
    assert sample_t(torch.zeros(1), "logit_normal").item() == 0  # u = 0 is a legal draw
    with pytest.raises(ValueError, match="cosmap.*uniform or logit_normal"):
        sample_t(u, "cosmap")


def test_a_thousand_times_stay_a_thousand_times():
    t = sample_t((torch.arange(1000) + 0.5).float() / 1000)
    assert len(t.unique()) == 1000 and len(t.bfloat16().unique()) < 600


# ---- the losses


def test_flow_loss_is_zero_for_the_velocity_and_the_mean_square_otherwise():
    x0, e, t = example()
    assert flow_loss(lambda x, t, text: e - x0, x0, None, t, e)[0] == 0
    loss, seen = flow_loss(lambda x, t, text: torch.zeros_like(x), x0, None, t, e)
    assert loss == pytest.approx(((e - x0) ** 2).mean().item(), rel=1e-6) and not seen["loss"].requires_grad
    with pytest.raises(ValueError, match="its target"):
        flow_loss(lambda x, t, text: x[:, :1], x0, None, t, e)  # would broadcast


def test_flow_loss_weighted_by_t_squared_is_the_error_of_x0():
    x0, e, t = example(torch.float64)
    net = lambda x, t, text: torch.sin(x)  # noqa: E731
    x_t = add_noise(x0, e, t)
    assert flow_loss(net, x0, None, t, e, weight=t**2)[0].item() == pytest.approx(((to_x0(x_t, net(x_t, t, None), t) - x0) ** 2).mean().item(), rel=1e-12)


def test_measurements_are_kept_apart_by_fifths_of_t():
    values, t = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.1, 0.15, 0.5, 1.0])
    a, b = by_t(values[:2], t[:2]), by_t(values[2:], t[2:])
    assert unfold({"x": (a + b) / 2, "y": torch.tensor(2.0)}) == {"x_t0": 2.0, "x_t2": 5.0, "x_t4": 7.0, "y": 2.0}
    assert a.shape == (2, BINS)


def test_guidance_is_u_plus_s_times_c_minus_u():
    c, u = torch.full((1, 1), 3.0), torch.full((1, 1), 1.0)
    net = lambda x, t, text: text  # noqa: E731
    assert guided(net, None, None, c, u, 4.0)[0] == 9 and guided(net, None, None, c, u, 4.0)[1] == 3
    calls = []
    assert guided(lambda x, t, text: calls.append(text) or text, None, None, c, u, 1.0)[0] == 3 and calls == [c]
    c, u = torch.full((3, 1, 1, 1, 1), 3.0), torch.full((3, 1, 1, 1, 1), 1.0)      # a scale per sample
    assert guided(net, None, None, c, u, torch.tensor([1.0, 2.0, 4.0]))[0].flatten().tolist() == [3, 5, 9]


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_dmd_gradient_is_the_closed_form_of_two_gaussians(t):
    """Unit Gaussians at mean a (student) and b (teacher): f - r = t² (a - b) / ((1 - t)² + t²) at every x_t and e."""
    a, b = 0.7, -0.4
    field = lambda m: lambda x, t, text: -m + ((t - (1 - t)) / ((1 - t) ** 2 + t**2)).view(-1, 1, 1, 1, 1) * (x - (1 - t).view(-1, 1, 1, 1, 1) * m)  # noqa: E731
    x0 = randn(3, 1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    e, times = randn(3, 1, 1, 2, 2, seed=5, dtype=torch.float64), torch.full((3,), t, dtype=torch.float64)
    loss, _ = dmd_loss(x0, field(b), field(a), None, None, times, e, 1.0)
    loss.backward()
    x_t = add_noise(x0.detach(), e, times)
    r = to_x0(x_t, field(b)(x_t, times, None), times)
    n = (x0.detach() - r).abs().mean((1, 2, 3, 4), keepdim=True)
    want = t**2 * (a - b) / ((1 - t) ** 2 + t**2) / n / x0.numel()
    assert torch.allclose(x0.grad, want.expand_as(x0), rtol=1e-12, atol=0)


def dmd_grad(x0, f, r, t=None):
    """The gradient for stubs whose x0 predictions are the given tensors."""
    x0 = x0.clone().requires_grad_()
    t = torch.full((len(x0),), 0.5, dtype=x0.dtype) if t is None else t
    e = randn(*x0.shape, seed=9, dtype=x0.dtype)
    net = lambda goal: lambda x, t, text: (x - goal) / t.view(-1, 1, 1, 1, 1)  # noqa: E731
    dmd_loss(x0, net(r), net(f), None, None, t, e, 1.0)[0].backward()
    return x0.grad


def test_the_normaliser_is_per_sample_and_of_degree_zero_and_guarded():
    x0, f, r = (randn(2, 1, 1, 2, 2, seed=s, dtype=torch.float64) for s in range(3))
    far = torch.stack([x0[0], 100 * x0[1]])
    alone = dmd_grad(x0[:1], f[:1], r[:1])
    assert torch.allclose(alone, 2 * dmd_grad(far, f, r)[:1], rtol=1e-6)          # a batch-wide mean would see sample 1
    assert torch.allclose(dmd_grad(10 * x0, 10 * f, 10 * r), dmd_grad(x0, f, r), rtol=1e-6)
    ratio = (f - r).abs().mean((1, 2, 3, 4)) / (x0 - r).abs().mean((1, 2, 3, 4))
    assert torch.allclose(dmd_grad(x0, f, r).abs().mean((1, 2, 3, 4)) * x0.numel(), ratio, rtol=1e-6)
    at_the_teacher = dmd_grad(x0, f, x0)
    assert at_the_teacher.isfinite().all() and at_the_teacher.abs().max() * x0.numel() <= 1.01 * (f - x0).abs().max() / 1e-5


def test_the_same_net_as_teacher_and_critic_gives_no_gradient_and_guidance_is_the_teachers_alone():
    x0, e, t = example()
    x0.requires_grad_()
    seen_text = []
    net = lambda x, t, text: torch.sin(x) + text  # noqa: E731
    critic = lambda x, t, text: seen_text.append(text) or net(x, t, text)  # noqa: E731
    text, null = torch.tensor(0.3), torch.tensor(-0.2)
    dmd_loss(x0, net, critic, text, null, t, e, 1.0)[0].backward()
    assert torch.equal(x0.grad, torch.zeros_like(x0)) and seen_text == [text]
    x0.grad = None
    _, seen = dmd_loss(x0, net, critic, text, null, t, e, 4.0)
    assert unfold(seen)["guidance_by_t4"] == pytest.approx(3 * 0.5 * 0.95, rel=1e-4)  # (s - 1) |c - u| in x0, t = .95
    assert unfold(seen)["matching_by_t4"] == 0


def test_samples_without_guidance_follow_the_conditional_teacher_and_have_no_part_in_the_cosine():
    x0, f, c, u, e = (randn(40, 3, 1, 2, 2, seed=s) for s in range(5))
    net = lambda x, t, text: torch.sin(x) + text  # noqa: E731
    scale, t = torch.tensor([1.0] * 39 + [3.0]), torch.tensor([0.3] * 39 + [0.7])
    r, plain = guided_x0(net, add_noise(x0, e, t), t, c, u, scale, 0.7)
    assert torch.equal(r[:39], plain[:39]) and not torch.allclose(r[39], plain[39])
    seen = dmd_loss(x0, net, lambda x, t, text: net(x, t, f), c, u, t, e, scale, 0.7)[1]
    assert seen["guidance_by"][:, 1].tolist() == [0, 39] and seen["cosine_by"][1].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_takes_back_the_contrast_that_guidance_adds_sample_by_sample(rescale):
    x0, f, c, u = (randn(2, 3, 1, 2, 2, seed=s, dtype=torch.float64).requires_grad_(s == 0) for s in range(4))
    net = lambda x, t, text: (x - text) / t.view(-1, 1, 1, 1, 1)  # noqa: E731
    t, e = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.zeros_like(x0)
    dmd_loss(x0, net, lambda x, t, text: net(x, t, f), c, u, t, e, 3.0, rescale)[0].backward()
    for i in range(2):
        r = u[i] + 3 * (c[i] - u[i])
        r = (1 - rescale) * r + rescale * r * c[i].std() / r.std()
        wanted = (f[i] - r) / (x0[i] - r).abs().mean() / x0.numel()
        assert torch.allclose(x0.grad[i], wanted.detach(), rtol=1e-9, atol=1e-12)


# ---- samplers


def test_euler_follows_the_straight_path_exactly():
    x0, e, _ = example(torch.float64)
    out = euler(lambda x, t, text: e - x0, e, None, grid(7, 3))
    assert torch.allclose(out, x0, atol=1e-12)


def test_rollout_ends_as_the_sampler_and_keeps_one_graph():
    z, noises = randn(*SHAPE), [randn(*SHAPE, seed=s) for s in (5, 6, 7)]
    w = torch.tensor(0.5, requires_grad=True)
    calls = []

    def net(x, t, text):
        calls.append((t[0].item(), torch.is_grad_enabled()))
        assert t.dtype == torch.float32
        return w * x + t.view(-1, 1, 1, 1, 1)

    times = grid(4, 5)
    x, by_hand = z, []
    with torch.no_grad():
        for k, t in enumerate(times):
            t = torch.full((4,), t)
            by_hand.append(to_x0(x, net(x, t, None), t))
            x = add_noise(by_hand[-1], noises[k], torch.full((4,), times[k + 1])) if k < 3 else None
    for exit in range(4):
        calls.clear()
        x0 = rollout(net, z, None, times, noises, exit)
        assert torch.equal(x0.detach(), by_hand[exit])  # exit 3: returned clean, not re-noised
        assert calls == [(pytest.approx(times[k]), k == exit) for k in range(exit + 1)]
    w.grad = None
    x0.square().sum().backward()
    last = add_noise(by_hand[2], noises[2], torch.full((4,), times[3]))
    v = torch.tensor(0.5, requires_grad=True)
    to_x0(last, v * last + 0.625, torch.full((4,), 0.625)).square().sum().backward()
    assert w.grad == pytest.approx(v.grad.item(), rel=1e-5)
    with torch.no_grad():
        assert not rollout(net, z, None, times, noises, 3).requires_grad


# ---- the step


def small(seed=0):
    p = randn(3, 2, seed=seed)
    rows = {"w": (p, 0, (3, 2)), "bias": (randn(3, seed=seed + 1), 0, (3,))}
    return rows, *adamw(rows, (0.9, 0.99), 0.1)


def closures(rows, batch, parts):
    """Closures over equal parts of a batch, and the norm that hands gradients over, as parallel.py does it."""
    leaves = {n: r[0].detach().requires_grad_() for n, r in rows.items()}

    def loss(x):
        value = (x @ leaves["w"].T + leaves["bias"]).square().mean()
        return value, {"loss": value.detach()}

    def norm():
        for name, leaf in leaves.items():
            rows[name][0].grad, leaf.grad = leaf.grad, None
        return torch.stack([r[0].grad.norm() for r in rows.values()]).norm()

    return [lambda x=x: loss(x) for x in batch.chunk(parts)], norm


def test_four_micro_batches_are_one_batch_and_all_four_are_used():
    batch, ends = randn(8, 2, seed=3), []
    for parts in (1, 4):
        rows, opt, _ = small()
        losses, norm = closures(rows, batch, parts)
        synced = []
        seen = train_step(opt, losses, lr=0.1, clip=1.0, sync=synced.append, norm=norm)
        assert synced == [False] * (parts - 1) + [True]
        ends.append((rows["w"][0], seen["loss"], seen["grad_norm"]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*ends))


@pytest.mark.parametrize("clip, factor", [(0.0, 1.0), (1e9, 1.0), (0.01, None)])
def test_clipping_scales_to_the_norm_and_zero_means_off(clip, factor):
    rows, opt, _ = small()
    losses, norm = closures(rows, randn(8, 2), 1)
    kept = {}
    opt.register_step_pre_hook(lambda *_: kept.update({n: r[0].grad.clone() for n, r in rows.items()}))
    seen = train_step(opt, losses, lr=0.1, clip=clip, sync=lambda last: None, norm=norm)
    after = torch.stack([g.norm() for g in kept.values()]).norm()
    assert after == pytest.approx(seen["grad_norm"].item() * factor if factor else 0.01, rel=1e-3)


def test_a_norm_that_is_not_finite_changes_nothing_and_is_counted():
    rows, opt, state = small()
    before = [x[0].clone() for x in (rows | state).values()]
    losses, norm = closures(rows, torch.tensor([[float("nan"), 1.0]]), 1)
    seen = train_step(opt, losses, lr=0.1, clip=1.0, sync=lambda last: None, norm=norm)
    assert seen["skipped"] == 1 and all(torch.equal(a, b[0]) for a, b in zip(before, (rows | state).values()))
    losses, norm = closures(rows, randn(2, 2), 1)
    assert train_step(opt, losses, lr=0.1, clip=1.0, sync=lambda last: None, norm=norm)["skipped"] == 0
    assert not torch.equal(before[0], rows["w"][0])


def test_adamw_decays_matrices_alone_and_its_state_is_there_from_the_start():
    rows = {"w": (torch.ones(2, 2), 0, (2, 2)), "bias": (torch.ones(2), 0, (2,)), "blocks.0.modulation": (torch.ones(1, 6, 2), 0, (1, 6, 2))}
    opt, state = adamw(rows, (0.9, 0.99), 0.5)
    assert set(state) == {f"{n}.{k}" for n in rows for k in ("step", "exp_avg", "exp_avg_sq")}
    for p, _, _ in rows.values():
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.1
    opt.step()
    assert torch.allclose(rows["w"][0], torch.tensor(0.95)) and (rows["bias"][0] == 1).all() and (rows["blocks.0.modulation"][0] == 1).all()
    assert state["w.step"][0] == 1  # the very tensors that the optimizer uses


def test_learning_rate_at_its_corners():
    at = lambda n, schedule: lr_at(n, lr=2.0, warmup=4, decay_steps=12, schedule=schedule)  # noqa: E731
    assert [at(n, "constant") for n in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert at(8, "cosine") == pytest.approx(1.0) and at(12, "cosine") == pytest.approx(0) and at(99, "cosine") == pytest.approx(0)
    assert at(4, "linear") == 2.0 and at(10, "linear") == pytest.approx(0.5)
    assert lr_at(0, lr=1.0, warmup=0, decay_steps=10, schedule="cosine") == 1.0
    assert lr_at(9, lr=1.0, warmup=2, decay_steps=None, schedule="constant") == 1.0


def test_ema_warms_up_and_is_swapped_in_and_out_to_the_bit_even_on_an_exception():
    p, ema = [torch.ones(3)], [torch.zeros(3)]
    ema_update(ema, p, 0.999, n=1)
    assert torch.allclose(ema[0], torch.tensor(1 - 2 / 11))
    ema_update(ema, p, 0.1, n=10**6)
    assert torch.allclose(ema[0], torch.tensor(0.1 * (1 - 2 / 11) + 0.9))
    p, ema = [randn(5)], [randn(5, seed=1)]
    kept = p[0].clone(), ema[0].clone()
    with pytest.raises(KeyboardInterrupt):
        with ema_weights(p, ema):
            assert torch.equal(p[0], kept[1])
            raise KeyboardInterrupt
    assert torch.equal(p[0], kept[0]) and torch.equal(ema[0], kept[1])
