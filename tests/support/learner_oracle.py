"""What learners compute, by hand: the papers' formulas in plain torch and NumPy. Nothing here comes from leanreplay.torch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

CLASSES, RATE = 3, 0.1


def dense(norm=False, outputs=CLASSES, seed=0):
    torch.manual_seed(seed)
    middle = [torch.nn.BatchNorm1d(5)] if norm else []
    return torch.nn.Sequential(torch.nn.Linear(4, 5), *middle, torch.nn.Tanh(), torch.nn.Linear(5, outputs)).double()


def conv(norm=True):
    torch.manual_seed(0)
    middle = [torch.nn.BatchNorm2d(2)] if norm else []
    layers = [
        torch.nn.Conv2d(1, 2, 3),
        *middle,
        torch.nn.Tanh(),
        torch.nn.Conv2d(2, 3, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(18, CLASSES),
    ]
    return torch.nn.Sequential(*layers).double()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE)


def batches(n, size, shape=(4,), classes=CLASSES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *shape, generator=g, dtype=torch.float64), torch.randint(0, classes, (size,), generator=g)) for _ in range(n)
    ]


def ce(logits, y, unused=()):
    """Mean of -log p_y, p without the unused classes."""
    kept = [c for c in range(logits.shape[1]) if c not in unused]
    return torch.stack([torch.logsumexp(z[kept], 0) - z[label] for z, label in zip(logits, y, strict=True)]).mean()


def drawn(twin, m):
    """m of the twin's samples as tensors: x, y, metadata."""
    (x, y), meta = twin.sample(min(m, len(twin)))
    return torch.from_numpy(x), torch.from_numpy(y), meta


def descend(model, loss):
    """theta <- theta - rate * gradient."""
    parameters = list(model.parameters())
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p -= RATE * g


def whole(weighted, normalise):
    """The sum of weight * value, over the sum of the weights if so."""
    total = sum(w * v for w, v in weighted)
    return total / sum(w for w, _ in weighted) if normalise else total


def held(buffer):
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    return {"x": x, "y": y, **meta}


def check_same(learner, model, buffer, step, losses, total, outputs):
    """A learner's step against what was computed by hand."""
    assert type(step.loss) is float and all(type(v) is float for v in step.losses.values())
    assert step.loss == pytest.approx(total.item(), rel=1e-9)
    assert step.losses == pytest.approx({k: v.item() for k, v in losses.items()}, rel=1e-9, abs=1e-15)
    assert not step.outputs.requires_grad
    torch.testing.assert_close(step.outputs, outputs.detach(), rtol=1e-9, atol=1e-12)
    for (name, mine), other in zip(learner.module.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    mine, other = held(learner.buffer), held(buffer)
    assert mine.keys() == other.keys() and learner.buffer.seen == buffer.seen
    for name, values in mine.items():
        assert values.dtype == other[name].dtype and values.shape == other[name].shape, name
        np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-6, err_msg=name)  # float32 of what rounding may have moved


def spy(function, calls):
    def called(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return called


def cls_hand(hand, copies, x1, y1, step_unused=()):
    """|f(x') - Z|^2, Z sample by sample."""
    now = hand(x1)
    with torch.no_grad():
        stable, plastic = copies["stable"](x1), copies["plastic"](x1)
        kept = [c for c in range(now.shape[1]) if c not in step_unused]
        z, chosen = [], []
        for s, p, label in zip(stable, plastic, y1, strict=True):
            ps, pp = (torch.exp(v[label]) / torch.exp(v[kept]).sum() for v in (s, p))
            chosen.append(bool(ps > pp))
            z.append(s if chosen[-1] else p)
    return ((now - torch.stack(z))[:, kept] ** 2).mean(), chosen


def chance(seed, purpose):
    """The keyed number in [0, 1) for a purpose: blake2b of the seed and the purpose."""
    text = seed.to_bytes(16, "little", signed=True) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16, person=b"leanreplay").digest()[:8], "little") / 2**64


def average(copies, hand, step, weights, probabilities, seed):
    for which in ("stable", "plastic"):
        if chance(seed, f"consistency {which} {step}") < probabilities[which]:
            a = min(1 - 1 / (step + 1), weights[which])
            with torch.no_grad():
                for c, p in zip(copies[which].parameters(), hand.parameters(), strict=True):
                    c.copy_(a * c + (1 - a) * p)


def pod_hand(a, b, kind, normalise):
    """The distance of two activations (n, c, w, h), in NumPy, as the paper's authors compute it."""

    def pooled(v):
        v = np.square(v)
        n = v.shape[0]
        p = {
            "pixel": lambda: v,
            "channel": lambda: v.sum(1),
            "width": lambda: v.sum(2),
            "height": lambda: v.sum(3),
            "gap": lambda: v.mean((2, 3)),
            "spatial": lambda: np.concatenate([v.sum(3).reshape(n, -1), v.sum(2).reshape(n, -1)], -1),
        }[kind]().reshape(n, -1)
        return p / np.sqrt((p**2).sum(1, keepdims=True)) if normalise else p

    return np.sqrt(((pooled(a) - pooled(b)) ** 2).sum(1)).mean()


def passed(model, x, layers):
    """Outputs and what the layers gave, one layer after the other."""
    found = {}
    for i, module in enumerate(model):
        x = module(x)
        if str(i) in layers:
            found[str(i)] = x
    return x, found


def pod_torch(now, stored, kind, normalise):
    """The same with gradients, for the pools that the step's test uses."""
    distances = []
    for name in now:
        vectors = []
        for v in (now[name], torch.from_numpy(stored[f"features.{name}"]).double()):
            v = (v * v).flatten(1) if kind == "pixel" else torch.cat([(v * v).sum(3).flatten(1), (v * v).sum(2).flatten(1)], 1)
            vectors.append(v / v.norm(dim=1, keepdim=True) if normalise else v)
        distances.append((vectors[0] - vectors[1]).norm(dim=1).mean())
    return sum(distances) / len(distances)
