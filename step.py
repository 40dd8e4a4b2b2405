"""The mathematics of training and distillation, and the one optimizer step both share. Imports nothing of ours.

A net is any callable net(x_t, t, cond) -> v; what cond holds is the net's business. Nothing here draws a random number:
t and e come in as tensors. Time runs from data to noise: t in [0, 1], t = 0 data, t = 1 noise,
x_t = (1 - t) x0 + t e, v = e - x0, x0 = x_t - t v. t is fp32 and never leaves it: bf16 would leave 506 of 1000 values.

Frames can be given: free (B, F) is 1 for a frame that is made and 0 for one that is given, None where all are made.
What enters has the given frames in place, the net is asked at t * free, so at 0 = data there, and they come out to the
bit; losses and measurements are over the free frames of each clip, of which there is at least one.

To log a number, return it in a loss's measurements: it is averaged over micro-batches and ranks, written to the log and
drawn. A name that ends in _by holds sums and counts per fifth of t, made by `binned`.

B batch · C F H W latent channels, frames, rows, columns · K sampling steps
"""
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from math import cos, pi
from typing import Callable

import torch

BINS = 5    # measurements are kept apart for fifths of t: a mean over t hides what goes wrong at one end
SKIPS = 20  # updates of a net skipped in a row, for gradients that are not finite, after which a run has failed


# ---- the flow -------------------------------------------------------------------------------------------------------


def over(t):
    """t (B,) or per frame (B, F), shaped to multiply (B, C, F, H, W)."""
    return t.view(len(t), 1, -1, 1, 1)


def add_noise(x0, e, t):
    """x_t = (1 - t) x0 + t e: the straight path from data to noise (rectified flow, arXiv 2209.03003, eq. 1)."""
    t = over(t)
    return (1 - t) * x0 + t * e


def first_given(x, given):
    """free (B, F) for clips x (B, C, F, H, W) whose first frame is given where given (B,) is true; None for stills."""
    if x.shape[2] == 1:
        return None
    free = torch.ones(len(x), x.shape[2], device=x.device)
    free[:, 0] -= given.float()
    return free


def place(z, x0, free):
    """What a sampler begins with: noise z in free frames (add_noise at t = 1), those of x0 where they are given."""
    return z if free is None else add_noise(x0, z, free)


def on_free(x, free):
    """x (B,) or per frame (B, F), 0 in given frames: (B, F); x itself where free is None."""
    return x if free is None else x.view(len(x), -1) * free


def mean_of(x, free):
    """Each clip's mean over the free frames of x (B, C, F, H, W): (B,)."""
    if free is None:
        return x.flatten(1).mean(1)
    return (x.mean((1, 3, 4)) * free).sum(1) / free.sum(1)


def whole(x, free):
    """Mean over clips of `mean_of`, the same however a batch is cut: ()."""
    return x.mean() if free is None else mean_of(x, free).mean()


def std_of(x, free):
    """Each clip's standard deviation over the free frames of x (B, C, F, H, W): (B,)."""
    if free is None:
        return x.flatten(1).std(1)
    return mean_of((x - over(mean_of(x, free))).square(), free).sqrt()


def to_x0(x_t, v, t):
    """x0 = x_t - t v: the clean sample that the velocity v points back to."""
    return x_t - over(t) * v


def shifted(t, shift):
    """s t / (1 + (s - 1) t): t moved towards noise for s > 1, 0 and 1 kept (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_t(u, density="uniform", shift=1.0, clamp=(0.0, 1.0), part=None):
    """Times from uniforms u (B,) in [0, 1): the density's inverse CDF, then the shift, then the clamp.

    density "uniform" or "logit_normal" (sigmoid of a standard normal; SD3, arXiv 2403.03206, eq. 19).
    part (b, expert): the law of the t of one of two experts, "high" for t ≥ b or "low" below, as it is within the whole
    law: u is moved to the expert's part of the CDF (truncation by the inverse CDF), so that strata stay strata.
    """
    if density not in ("uniform", "logit_normal"):
        raise ValueError(f"t density {density!r}: it is uniform or logit_normal")
    u = u.double()
    if part:
        below = share_below(part[0], density, shift)
        u = below + (1 - below) * u if part[1] == "high" else below * u
    t = u if density == "uniform" else torch.special.ndtri(u).sigmoid()
    t = shifted(t, shift).clamp(*clamp).float()
    return t if part is None else within(t, *part)


def share_below(b, density, shift):
    """F(b), the part of all t that lie below b: the inverse of the shift, then the density's CDF."""
    b = torch.tensor(b / (shift - (shift - 1) * b), dtype=torch.float64)
    return (b if density == "uniform" else torch.special.ndtr(b.logit())).item()


def within(t, b, expert):
    """t fp32 of an expert's part of [0, 1], where rounding has put it to the other's side of b moved to its own."""
    b = torch.tensor(b, dtype=torch.float32, device=t.device)
    return t.clamp(min=b) if expert == "high" else t.clamp(max=torch.nextafter(b, torch.zeros_like(b)))


def is_high(t, b):
    """Whether a time, a plain number, is the expert's for high noise; by fp32, which is what the net is told."""
    t, b = torch.tensor([t, b], dtype=torch.float32)
    return bool(t >= b)


def scales_at(times, guidance, b):
    """The guidance scale at each of these times, of (high, low) the expert's own; a number is that of all."""
    if isinstance(guidance, (int, float)):
        return [guidance] * len(times)
    high, low = guidance
    return [high if is_high(t, b) else low for t in times]


def guided(net, x_t, t, cond, uncond, scale):
    """Velocity with classifier-free guidance, u + s (c - u), and the conditional c alone (arXiv 2207.12598).

    scale (B,), 1 for a sample without guidance, or None for no guidance at all, which costs one forward instead of two.
    """
    c = net(x_t, t, cond)
    if scale is None:
        return c, c
    u = net(x_t, t, uncond)
    s = over(scale)
    return torch.where(s == 1, c, u + s * (c - u)), c


def guided_x0(net, x_t, t, cond, uncond, scale, rescale=0.0, free=None):
    """The x0 that `guided` leads to, and the conditional one alone; given frames are x_t's in both.

    rescale in [0, 1] takes back the contrast that guidance adds: all of it at 1, where the first has the second's std
    (arXiv 2305.08891, eq. 15-16).
    """
    t = on_free(t, free)
    v, v_cond = guided(net, x_t, t, cond, uncond, scale)
    r, c = to_x0(x_t, v, t), to_x0(x_t, v_cond, t)
    if rescale:
        r = r * over(1 + on_free(rescale * (std_of(c, free) / std_of(r, free) - 1), free))
    return r, c


# ---- samplers -------------------------------------------------------------------------------------------------------


def grid(steps, shift):
    """K descending times S(i / K), i = K .. 1, from 1 on; the sampler's last step lands on 0, which is not listed."""
    return [shifted(i / steps, shift) for i in range(steps, 0, -1)]


def ode(net, z, cond, times, uncond=None, scale=1.0, solver="euler", free=None):
    """x0 from noise z (B, C, F, H, W): the last point of `trajectory`."""
    for x in trajectory(net, z, cond, times, uncond, scale, solver, free):
        pass
    return x


@torch.no_grad()
def trajectory(net, z, cond, times, uncond=None, scale=1.0, solver="euler", free=None):
    """Yields x after each step from noise z (B, C, F, H, W) along dx = v dt: at times[1:], then at 0.

    times descend from z's; a net's call a step, guided by scale, a number or one for each of the times. solver "euler",
    of first order, or "ab2", of second: Adams-Bashforth, which carries v on from the step before by a straight line;
    its first step is Euler's.
    """
    x, before = z, None                                 # before: v and length of the last step
    scales = [scale] * len(times) if isinstance(scale, (int, float)) else scale
    for t, t_next, scale in zip(times, [*times[1:], 0.0], scales, strict=True):
        s = None if scale == 1 else x.new_full((len(x),), scale, dtype=torch.float32)
        asked = on_free(x.new_full((len(x),), t, dtype=torch.float32), free)
        v, _ = guided(net, x, asked, cond, uncond, s)
        h, mean_v = t_next - t, v
        if solver == "ab2" and before:
            v_before, h_before = before
            mean_v = v + h / (2 * h_before) * (v - v_before)
        x = x + (h if free is None else h * over(free)) * mean_v
        before = v, h
        yield x


def rollout(net, z, cond, times, noises, exit, free=None):
    """x0 predicted by step number `exit` of the few-step sampler: predict x0, re-noise it to the next time, repeat.

    z (B, C, F, H, W) is at times[0]; noises[k] carries step k's x0 to times[k + 1]. The last of K steps returns x0 as
    it is, so exit = K - 1 is sampling, and what is trained is what is sampled. Only the forward at `exit` keeps a
    graph, and only where gradients are enabled (backward simulation, DMD2, arXiv 2405.14867, section 4.5).
    """
    x = z
    for k, t in enumerate(times[:exit + 1]):
        with torch.set_grad_enabled(torch.is_grad_enabled() and k == exit):
            t = on_free(x.new_full((len(x),), t, dtype=torch.float32), free)
            x0 = to_x0(x, net(x, t, cond), t)
        if k < exit:
            x = add_noise(x0, noises[k], on_free(torch.full_like(t, times[k + 1]), free))
    return x0


def by_chunks(draw, see, conds, noises):
    """Makes a clip chunk by chunk with a causal net: yields x0 (B, C, f, H, W) of each, without end if noises are.

    draw(*conds, *some) -> x0 of a chunk, `some` being the next of noises. see(cond, x0) -> the condition that has seen
    x0 too, which is without gradient; each condition sees for itself, and None stays None.
    """
    unseen = []
    for some in noises:
        for x0 in unseen:
            with torch.no_grad():
                conds = [None if cond is None else see(cond, x0) for cond in conds]
        x0 = draw(*conds, *some)
        yield x0
        unseen = [x0]


def stepwise(draw, see, conds, chunk, *noises, free=None):
    """A whole clip x0 (B, C, F, H, W) by chunks of so many frames, the last perhaps shorter; see by_chunks.

    free (B, F) or None and noises (B, C, F, H, W) are cut along frames; each draw gets its part of all of them,
    draw(*conds, free, *noises).
    """
    frees = repeat(None) if free is None else free.split(chunk, 1)
    cut = zip(frees, *(noise.split(chunk, 2) for noise in noises))
    return torch.cat(list(by_chunks(draw, see, conds, cut)), 2)


def noises_of(sampling):
    """How many noises a clip takes by a checkpoint's own sampler."""
    return len(sampling["times"]) if sampling["sampler"] == "rollout" else 1


def at_once(net, sampling, cond, uncond, z, *noises, free=None):
    """x0 of a clip, or of a chunk, by a checkpoint's own sampler; given frames are in z."""
    if sampling["sampler"] == "rollout":
        return rollout(net, z, cond, sampling["times"], noises, len(noises), free)
    return guided_ode(net, sampling, z, cond, grid(sampling["steps"], sampling["shift"]), uncond, free)


def guided_ode(net, sampling, z, cond, times, uncond, free):
    """x0 from z at times[0], with the guidance and by the solver of a checkpoint that predicts velocities."""
    solver = sampling.get("solver", "euler")            # of old checkpoints
    scales = scales_at(times, sampling["guidance"], sampling.get("boundary"))
    return ode(net, z, cond, times, uncond, scales, solver, free)


def sample(net, draw, cond, uncond, sampling, free=None, see=None):
    """x0 by a checkpoint's own sampler: a teacher's guided steps, or a student's few, each with fresh noise.

    sampling: the checkpoint's block of that name; draw(k): the k-th noise of these clips (B, C, F, H, W), in the first
    of which given frames are in place. see: of a causal net, which goes chunk by chunk: see by_chunks.
    """
    z, *noises = [draw(k) for k in range(noises_of(sampling))]
    if see is None:
        return at_once(net, sampling, cond, uncond, z, *noises, free=free)

    def chunk(cond, uncond, free, z, *noises):
        return at_once(net, sampling, cond, uncond, z, *noises, free=free)

    uncond = None if sampling["guidance"] == 1 else uncond      # nobody asks for it: it need not see
    return stepwise(chunk, see, (cond, uncond), sampling["tile"][0], z, *noises, free=free)


# ---- losses: (scalar, {name: detached measurement}) -----------------------------------------------------------------


def binned(values, t, where=None, times=None):
    """Sums and counts (2, BINS) of values (B,) in fifths of t (B,) or (B, F); `where` (B,) selects samples.

    times: the few that t takes, whose sums (2, len(times)) are kept apart instead, the lowest first. Sums and counts
    stay right when averaged over micro-batches and ranks; `numbers` divides them at the end.
    """
    t = t if t.ndim == 1 else t.mean(1)
    if times:
        n = len(times)
        bins = (t[:, None] - t.new_tensor(sorted(times))).abs().argmin(1)
    else:
        n = BINS
        bins = (t * BINS).long().clamp(max=BINS - 1)
    some = torch.ones_like(values, dtype=torch.float32)
    if where is not None:
        some = some * where
    sums = torch.stack([values.detach().float() * some, some])
    return torch.zeros(2, n, device=values.device).index_add_(1, bins, sums)


def numbers(seen):
    """Measurements as plain numbers: a_by becomes a_by_t0, a_by_t1 .., fifths of t without a sample left out."""
    flat = {}
    for name, x in seen.items():
        if name.endswith("_by"):
            flat |= {f"{name}_t{i}": s / n for i, (s, n) in enumerate(x.T.tolist()) if n > 0}
        else:
            flat[name] = float(x)
    return flat


def flow_loss(net, x0, cond, t, e, weight=None, free=None, times=None):
    """Flow matching: mean of w (net(x_t, t, cond) - (e - x0))² (arXiv 2210.02747, eq. 23).

    x0, e (B, C, F, H, W), t and weight (B,) or (B, F), weight None = 1; weight t² makes it the error of x0 itself.
    times: those that t takes, whose weighted errors are then measured apart; see binned.
    """
    asked = on_free(t, free)
    v = net(add_noise(x0, e, asked), asked, cond)
    if v.shape != x0.shape:
        raise ValueError(f"the net gives {tuple(v.shape)}, its target is {tuple(x0.shape)}")
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    squares = (v - (e - x0)).square()
    error = mean_of(squares, free)
    weighted = error
    if weight is not None:
        weighted = weight * error if weight.ndim == 1 else mean_of(over(weight) * squares, free)
    loss = weighted.mean()
    if t.ndim == 1:
        by_t = binned(weighted if times else error, t, times=times)
    else:               # the mean of a clip's times would say little
        where = None if free is None else free.flatten()
        by_t = binned(squares.mean((1, 3, 4)).flatten(), t.flatten(), where, times)
    return loss, {"loss": loss.detach(), "loss_by": by_t}


def dmd_loss(x0, teacher, critic, cond, uncond, t, e, scale, rescale=0.0, free=None):
    """Distribution matching: a scalar whose gradient on x0 is (f - r) / (n · numel) (DMD, arXiv 2311.18828, eq. 7-8).

    f and r are the critic's and the guided teacher's x0 at the re-noised x0, n = mean|x0 - r| of each sample, ≥ 1e-5.
    scale, rescale: see guided_x0. Measured apart: f - r = (f - c) - (r - c), the matching part and the guidance part,
    (s - 1)(c - u) of x0 without rescale (arXiv 2511.22677), and their cosine where there is guidance.
    f, r and c have the given frames of x0: no gradient there, and numel counts the clips times a clip's free numbers.
    """
    with torch.no_grad():
        asked = on_free(t, free)
        x_t = add_noise(x0, e, asked)
        f = to_x0(x_t, critic(x_t, asked, cond), asked)
        r, c = guided_x0(teacher, x_t, t, cond, uncond, scale, rescale, free)
        n = mean_of((x0 - r).abs(), free).clamp_min(1e-5)
        grad = (f - r) / over(n)

        matching, guidance = f - c, r - c
        cosine = torch.nn.functional.cosine_similarity(matching.flatten(1), guidance.flatten(1), dim=1)
        mean = whole(x0, free)
        std = x0.std() if free is None else whole((x0 - mean).square(), free).sqrt()
        seen = {"loss": 0.5 * whole(grad.square(), free), "x0_mean": mean, "x0_std": std,
                "matching_by": binned(mean_of(matching.abs(), free), t),
                "guidance_by": binned(mean_of(guidance.abs(), free), t),
                "cosine_by": binned(cosine, t, guidance.flatten(1).any(1)),
                "normaliser_by": binned(n, t)}
    return whole(grad * x0, free), seen


# ---- the step -------------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """A net that learns, as its update sees it. Rows are {name: Part}, with plain tensors that this rank holds."""
    rows: dict                      # what is trained; the tensors share storage with the net
    opt: torch.optim.Optimizer
    opt_rows: dict                  # the optimizer's state
    sync: Callable                  # sync(last), before each micro-batch's backward
    norm: Callable                  # norm() hands the reduced gradients to rows' tensors -> their global norm, 0-d
    average: dict = field(default_factory=dict)     # rows of the averaged weights, where there are any
    counts: dict = field(default_factory=lambda: {"updates": 0, "skipped": 0, "in_a_row": 0})   # go into checkpoints


def train_step(me, losses, *, lr, clip, ema=None):
    """One update of a Learner from len(losses) micro-batches -> their mean measurements, grad_norm and lr.

    losses: closures () -> (loss, seen), one per micro-batch of equal size. clip: the largest norm that is left alone,
    0 = any. ema: decay of the average, None = none. A norm that is not finite skips the update and counts it; it is the
    same number on every rank, so that all of them skip without asking each other. RuntimeError where no trained tensor
    has a gradient, and after SKIPS skipped in a row.
    """
    seen = []
    for i, loss_of in enumerate(losses, 1):
        me.sync(i == len(losses))
        loss, measured = loss_of()
        (loss / len(losses)).backward()
        seen.append(measured)

    grad_norm = me.norm()
    grads = [part.tensor.grad for part in me.rows.values() if part.tensor.grad is not None]
    if not grads:
        raise RuntimeError("no trained tensor has a gradient: the loss does not depend on what is trained")
    if clip > 0:
        torch._foreach_mul_(grads, (clip / (grad_norm + 1e-6)).clamp(max=1.0))
    for group in me.opt.param_groups:
        group["lr"] = lr * group["scale"]
    finite = grad_norm.isfinite()
    me.opt.found_inf = (~finite).float()    # the optimizer leaves everything as it is where this is 1
    me.opt.step()
    me.opt.zero_grad(set_to_none=True)

    # The only wait for the device in a step, when all its work is queued and the loader has begun on the next batch.
    if finite.item():
        me.counts["updates"] += 1
        me.counts["in_a_row"] = 0
        if ema is not None:
            ema_update(me, ema)
    else:
        me.counts["skipped"] += 1
        me.counts["in_a_row"] += 1
        if me.counts["in_a_row"] == SKIPS:
            raise RuntimeError(f"the gradients of {SKIPS} updates in a row held NaN or infinity: try a lower learning "
                               "rate, or look at the samples that were named")
    mean = {name: torch.stack([measured[name] for measured in seen]).mean(0) for name in seen[0]}
    return mean | {"grad_norm": grad_norm, "lr": lr}


def adamw(rows, betas, weight_decay):
    """AdamW over plain local tensors, decay on matrices only -> (optimizer, {name: Part} of its state).

    The state is made here, not at the first step, so that a checkpoint can be read into it. Norms, biases and
    modulations are not decayed (arXiv 1711.05101 decays all; DiTs do not). A group's learning rate is `scale` times the
    run's. Rows may be a shard of a matrix: an optimizer that needs it whole has to gather it.
    """
    decayed = {name: len(part.shape) >= 2 and not name.endswith("modulation") for name, part in rows.items()}
    groups = [{"params": [rows[name].tensor for name in rows if decayed[name] == matrices], "scale": 1.0,
               "weight_decay": weight_decay if matrices else 0.0} for matrices in (True, False)]
    fused = not any(part.tensor.is_meta for part in rows.values())      # a plan counts the state on meta
    opt = torch.optim.AdamW(groups, betas=betas, fused=fused)
    state = {}
    for name, part in rows.items():
        p = part.tensor
        s = opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}
        state[f"{name}.step"] = part._replace(tensor=s["step"], first=0, shape=())
        state[f"{name}.exp_avg"] = part._replace(tensor=s["exp_avg"])
        state[f"{name}.exp_avg_sq"] = part._replace(tensor=s["exp_avg_sq"])
    return opt, state


def muon(rows, betas, weight_decay, gather):
    """Muon for the matrices of the blocks, AdamW for the rest -> (optimizer, {name: Part} of its state).

    gather([(rows here, columns)], rows) -> (n, rows, columns): stacks n matrices of one shape whole, of each of which
    this rank holds a part. See `Muon`, `adamw`.
    """
    matrices = {name: part for name, part in rows.items() if name.startswith("blocks.") and len(part.shape) == 2}
    rest = {name: part for name, part in rows.items() if name not in matrices}
    opt, state = adamw(rest, betas, weight_decay)
    momenta = {name: part._replace(tensor=torch.zeros_like(part.tensor)) for name, part in matrices.items()}
    state |= {f"{name}.momentum": part for name, part in momenta.items()}
    return Muon(matrices, momenta, weight_decay, gather, opt), state


class Muon:
    """Nesterov momentum whose matrix is made orthogonal (arXiv 2502.16982, eq. 1-4); an update's root mean square is
    about 0.2, as AdamW's is, so that one learning rate serves both. Matrices are updated whole: rows of a part of one
    would become orthogonal to each other, not to the rest. `rest` is the optimizer of all else.
    """
    MOMENTUM = 0.95
    AT_ONCE = 1 << 26   # numbers that are gathered at once

    def __init__(self, rows, momenta, weight_decay, gather, rest):
        self.rows, self.momenta, self.gather, self.rest = rows, momenta, gather, rest
        self.group = {"lr": 0.0, "scale": 1.0, "weight_decay": weight_decay}
        self.param_groups = [*rest.param_groups, self.group]

    def zero_grad(self, set_to_none=True):
        self.rest.zero_grad(set_to_none)
        for part in self.rows.values():
            part.tensor.grad = None

    @torch.no_grad()
    def step(self):
        """One update; where found_inf is 1, all stays as it is, and nobody waits for the device to know."""
        self.rest.found_inf = self.found_inf
        self.rest.step()
        bad = self.found_inf.bool()
        lr = self.group["lr"] * (1 - self.found_inf)
        for shape, names in self.alike():
            parts = [self.rows[name].tensor for name in names]
            momenta = [self.momenta[name].tensor for name in names]
            grads = [torch.where(bad, m, p.grad) for p, m in zip(parts, momenta)]
            torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
            ahead = torch._foreach_lerp(grads, momenta, self.MOMENTUM)
            whole = orthogonal(self.gather(ahead, shape[0])).mul_(lr * 0.2 * max(shape)**0.5)
            torch._foreach_mul_(parts, 1 - lr * self.group["weight_decay"])
            for name, p, update in zip(names, parts, whole):
                first = self.rows[name].first
                p.sub_(update[first:first + len(p)])

    def alike(self):
        """[(shape, names)] of matrices of one shape that have gradients, as many as are gathered at once."""
        found = {}
        for name, part in self.rows.items():
            if part.tensor.grad is not None:
                found.setdefault(part.shape, []).append(name)
        for shape, names in found.items():
            n = max(1, self.AT_ONCE // (shape[0] * shape[1]))
            for i in range(0, len(names), n):
                yield shape, names[i:i + n]


# Coefficients of the polynomials, one a product of three, each the best for what the ones before it leave, where the
# smallest singular value that matters is 0.01 of the norm (arXiv 2505.16932, algorithm 1): 0.73 to 1.27 at the end.
QUINTICS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonal(x):
    """x (n, rows, columns), the singular values of each matrix brought near 1 by odd polynomials of the fifth degree.

    x ← a x + b x xᵀ x + c (x xᵀ)² x for each of QUINTICS, from a Frobenius norm of 1. bf16 on a GPU; -> fp32.
    """
    tall = x.shape[1] > x.shape[2]
    flat = x.mT if tall else x          # the smaller of the two products is iterated
    flat = flat / flat.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.is_cuda:
        flat = flat.bfloat16()
    for a, b, c in QUINTICS:
        gram = flat @ flat.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        flat = torch.baddbmm(flat, gram, flat, beta=a)
    return (flat.mT if tall else flat).float()


def lr_at(step, *, lr, warmup, decay_steps, schedule):
    """Learning rate of update number `step` (from 0): a linear warm-up to lr, then constant, cosine or linear to 0.

    The first update of a warm-up has lr / warmup, not 0. decay_steps counts updates from 0, warm-up included; a
    constant schedule has none.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    return lr * {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done}[schedule]


@torch.no_grad()
def ema_update(me, decay):
    """average ← β average + (1 - β) net in place, β = min(decay, (1 + n) / (10 + n)) after n updates of the net."""
    n = me.counts["updates"]
    torch._foreach_lerp_(tensors(me.average), tensors(me.rows), 1 - min(decay, (1 + n) / (10 + n)))


@contextmanager
@torch.no_grad()
def averaged(me):
    """Swaps the averaged weights into the net; afterwards, also after an exception, both are as they were."""
    def swap():
        for p, a in zip(tensors(me.rows), tensors(me.average), strict=True):
            kept = p.clone()
            p.copy_(a)
            a.copy_(kept)
    swap()
    try:
        yield
    finally:
        swap()


@torch.no_grad()
def start_again(me, optimizer):
    """The net goes on from its average, by another optimizer, a function of rows: a run of its own."""
    torch._foreach_copy_(tensors(me.rows), tensors(me.average))
    me.opt, me.opt_rows = optimizer(me.rows)
    me.counts = {"updates": 0, "skipped": 0, "in_a_row": 0}


@torch.no_grad()
def start_average(me):
    """average ← net, when the net has its first values."""
    torch._foreach_copy_(tensors(me.average), tensors(me.rows))


def copies(rows):
    """Rows of the same places with tensors of their own."""
    return {name: part._replace(tensor=part.tensor.clone()) for name, part in rows.items()}


def tensors(rows):
    return [part.tensor for part in rows.values()]
