"""The mathematics of training and distillation, and the one optimizer step both share. Imports nothing of ours.

A net is any callable net(x_t, t, text) -> v. Nothing here draws a random number: t and e come in as tensors.
Time runs from data to noise: t in [0, 1], t = 0 data, t = 1 noise, x_t = (1 - t) x0 + t e, v = e - x0, x0 = x_t - t v.
t is fp32 and never leaves it: bf16 would leave 506 of 1000 values.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width · K sampling steps
"""
from contextlib import contextmanager
from itertools import pairwise
from math import cos, pi

import torch

BINS = 5  # measurements are kept apart for fifths of t: a mean over t hides what goes wrong at one end


# ---- the flow -------------------------------------------------------------------------------------------------------


def over(t):
    """t (B,) or per frame (B, F), shaped to multiply (B, C, F, H, W)."""
    return t.view(len(t), 1, -1, 1, 1)


def add_noise(x0, e, t):
    """x_t = (1 - t) x0 + t e: the straight path from data to noise (rectified flow, arXiv 2209.03003, eq. 1)."""
    t = over(t)
    return (1 - t) * x0 + t * e


def to_x0(x_t, v, t):
    """x0 = x_t - t v: the clean sample that the velocity v points back to."""
    return x_t - over(t) * v


def shifted(t, shift):
    """s t / (1 + (s - 1) t): t moved towards noise for s > 1, 0 and 1 kept (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_t(u, density="uniform", shift=1.0, clamp=(0.0, 1.0)):
    """Times from uniforms u (B,) in [0, 1): the density's inverse CDF, then the shift, then the clamp.

    density "uniform" or "logit_normal" (sigmoid of a standard normal; SD3, arXiv 2403.03206, eq. 19).
    """
    if density not in ("uniform", "logit_normal"):
        raise ValueError(f"t density {density!r}: it is uniform or logit_normal")
    u = u.double()
    t = u if density == "uniform" else torch.special.ndtri(u).sigmoid()
    return shifted(t, shift).clamp(*clamp).float()


def guided(net, x_t, t, text, null, scale):
    """Velocity with classifier-free guidance, u + s (c - u), and the conditional c alone (arXiv 2207.12598).

    null is the unconditional text, text-shaped; scale a number, or (B,) for a scale per sample, 1 for none. The number 1
    costs one forward instead of two.
    """
    c = net(x_t, t, text)
    if not torch.is_tensor(scale) and scale == 1:
        return c, c
    u = net(x_t, t, null)
    if not torch.is_tensor(scale):
        return u + scale * (c - u), c
    return torch.where(over(scale) == 1, c, u + over(scale) * (c - u)), c


def guided_x0(net, x_t, t, text, null, scale, rescale=0.0):
    """The x0 that `guided` leads to, and the conditional one alone.

    rescale in [0, 1] takes back the contrast that guidance adds: all of it at 1, where the first has the second's std
    (arXiv 2305.08891, eq. 15-16).
    """
    r, c = (to_x0(x_t, v, t) for v in guided(net, x_t, t, text, null, scale))
    if rescale:
        r = r * over(1 + rescale * (c.flatten(1).std(1) / r.flatten(1).std(1) - 1))
    return r, c


# ---- samplers -------------------------------------------------------------------------------------------------------


def grid(steps, shift):
    """K descending times S(i / K), i = K .. 1, from 1 on; the sampler's last step lands on 0, which is not listed."""
    return [shifted(i / steps, shift) for i in range(steps, 0, -1)]


@torch.no_grad()
def euler(net, z, text, times, null=None, scale=1.0):
    """x0 from noise z (B, C, F, H, W) by Euler steps of the ODE dx = v dt over the descending times, guided by scale."""
    x = z
    for t, t_next in pairwise([*times, 0.0]):
        v, _ = guided(net, x, x.new_full((len(x),), t, dtype=torch.float32), text, null, scale)
        x = x + (t_next - t) * v
    return x


def rollout(net, z, text, times, noises, exit):
    """x0 predicted by step number `exit` of the few-step sampler: predict x0, re-noise it to the next time, repeat.

    z (B, C, F, H, W) is at times[0]; noises[k] carries step k's x0 to times[k + 1]. The last of K steps returns x0 as it
    is, so exit = K - 1 is sampling, and what is trained is what is sampled. Only the forward at `exit` keeps a graph, and
    only where gradients are enabled (backward simulation, DMD2, arXiv 2405.14867, section 4.5).
    """
    x = z
    for k, t in enumerate(times[:exit + 1]):
        with torch.set_grad_enabled(torch.is_grad_enabled() and k == exit):
            t = x.new_full((len(x),), t, dtype=torch.float32)
            x0 = to_x0(x, net(x, t, text), t)
        if k < exit:
            x = add_noise(x0, noises[k], torch.full_like(t, times[k + 1]))
    return x0


# ---- losses: (scalar, {name: detached measurement}) -----------------------------------------------------------------


def by_t(values, t, of=True):
    """values (B,), of some samples (B,) or all, summed and counted per fifth of t (B,): (2, BINS); `unfold` divides.

    Such sums are right under averaging too.
    """
    t = t if t.ndim == 1 else t.mean(1)
    bins = (t * BINS).long().clamp(max=BINS - 1)
    some = torch.ones_like(values, dtype=torch.float32) * of
    sums = torch.stack([values.detach().float() * some, some])
    return torch.zeros(2, BINS, device=values.device).index_add_(1, bins, sums)


def unfold(seen):
    """Measurements as plain numbers: a (2, BINS) tensor `a` becomes a_t0 .. a_t4, bins that saw no sample left out."""
    flat = {}
    for name, x in seen.items():
        if torch.is_tensor(x) and x.ndim == 2:
            flat |= {f"{name}_t{i}": s / n for i, (s, n) in enumerate(x.T.tolist()) if n > 0}
        else:
            flat[name] = float(x)
    return flat


def flow_loss(net, x0, text, t, e, weight=None):
    """Flow matching: mean of w (net(x_t, t, text) - (e - x0))² (arXiv 2210.02747, eq. 23).

    x0, e (B, C, F, H, W), t (B,) or (B, F), weight (B,) or None = 1; weight t² makes it the error of x0 itself.
    """
    v = net(add_noise(x0, e, t), t, text)
    if v.shape != x0.shape:
        raise ValueError(f"the net gives {tuple(v.shape)}, its target is {tuple(x0.shape)}")
    error = (v.to(torch.promote_types(v.dtype, torch.float32)) - (e - x0)).square().flatten(1).mean(1)
    loss = (error if weight is None else weight * error).mean()
    return loss, {"loss": loss.detach(), "loss_by": by_t(error, t)}


def dmd_loss(x0, teacher, critic, text, null, t, e, scale, rescale=0.0):
    """Distribution matching: a scalar whose gradient on x0 is (f - r) / (n · numel) (DMD, arXiv 2311.18828, eq. 7-8).

    f and r are the critic's and the guided teacher's x0 at the re-noised x0, n = mean|x0 - r| of each sample, ≥ 1e-5.
    f - r = (f - c) - (r - c): the matching part and the guidance part, (s - 1)(c - u) of x0 without rescale, measured apart
    (arXiv 2511.22677); their cosine where there is guidance. scale, rescale: see guided_x0.
    """
    with torch.no_grad():
        x_t = add_noise(x0, e, t)
        f = to_x0(x_t, critic(x_t, t, text), t)
        r, c = guided_x0(teacher, x_t, t, text, null, scale, rescale)
        n = (x0 - r).abs().flatten(1).mean(1).clamp_min(1e-5)
        grad = (f - r) / n.view(-1, 1, 1, 1, 1)
        matching, guidance = (f - c).flatten(1), (r - c).flatten(1)
        cosine = torch.nn.functional.cosine_similarity(matching, guidance, dim=1)
        seen = {"loss": 0.5 * grad.square().mean(), "x0_mean": x0.mean(), "x0_std": x0.std(),
                "matching_by": by_t(matching.abs().mean(1), t), "guidance_by": by_t(guidance.abs().mean(1), t),
                "cosine_by": by_t(cosine, t, guidance.any(1)), "normaliser_by": by_t(n, t)}
    return (grad * x0).mean(), seen


# ---- the step -------------------------------------------------------------------------------------------------------


def train_step(opt, losses, *, lr, clip, sync, norm):
    """One update from len(losses) micro-batches; returns their mean measurements, grad_norm and skipped (0 or 1).

    losses: closures () -> (loss, seen), one per micro-batch of equal size. sync(last) is called before each backward, so
    that gradients are reduced over ranks on the last one only; norm() hands the reduced gradients to the optimizer's
    tensors and returns their global norm. clip: the largest norm that is left alone, 0 = any. A norm that is not finite
    skips the update; it is the same number on every rank, so that all of them skip without asking each other.
    """
    seen = []
    for i, loss_of in enumerate(losses, 1):
        sync(i == len(losses))
        loss, measured = loss_of()
        (loss / len(losses)).backward()
        seen.append(measured)
    grad_norm = norm()
    finite = bool(grad_norm.isfinite())  # the one wait for the device in a step
    if finite:
        if clip > 0:
            grads = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, (clip / (grad_norm + 1e-6)).clamp(max=1.0))
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    opt.zero_grad(set_to_none=True)
    mean = {name: torch.stack([measured[name] for measured in seen]).mean(0) for name in seen[0]}
    return mean | {"grad_norm": grad_norm, "skipped": 0.0 if finite else 1.0}


def adamw(rows, betas, weight_decay):
    """AdamW over plain local tensors, decay on matrices only, and its state under names: (optimizer, state rows).

    rows {name: (tensor, first_row, global_shape)}; the state is made here, not at the first step, so that a checkpoint
    can be read into it. Norms, biases and modulations are not decayed (arXiv 1711.05101 decays all; DiTs do not).
    """
    decayed = {n: len(shape) >= 2 and not n.endswith("modulation") for n, (_, _, shape) in rows.items()}
    groups = [{"params": [rows[n][0] for n in rows if decayed[n] == d], "weight_decay": weight_decay * d}
              for d in (True, False)]
    opt = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, fused=True)
    state = {}
    for name, (p, first, shape) in rows.items():
        s = opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}
        state |= {f"{name}.step": (s["step"], 0, ()), f"{name}.exp_avg": (s["exp_avg"], first, shape),
                  f"{name}.exp_avg_sq": (s["exp_avg_sq"], first, shape)}
    return opt, state


def lr_at(step, *, lr, warmup, decay_steps, schedule):
    """Learning rate of update number `step` (from 0): a linear warm-up to lr, then constant, cosine or linear to 0.

    The first update of a warm-up has lr / warmup, not 0. decay_steps counts updates from 0, warm-up included; a constant
    schedule has none.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    return lr * {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done}[schedule]


@torch.no_grad()
def ema_update(ema, params, decay, n):
    """ema ← β ema + (1 - β) params in place, β = min(decay, (1 + n) / (10 + n)) after n updates of the net."""
    torch._foreach_lerp_(ema, params, 1 - min(decay, (1 + n) / (10 + n)))


@contextmanager
@torch.no_grad()
def ema_weights(params, ema):
    """Inside, the net computes with its averaged weights; afterwards, also after an exception, both are as they were."""
    def swap():
        for p, a in zip(params, ema, strict=True):
            kept = p.clone()
            p.copy_(a)
            a.copy_(kept)
    swap()
    try:
        yield
    finally:
        swap()
