"""All clients of a trained run as stacked tensors; recipes as (N, B) and (N, P); everything measured in cohorts."""
import os, pickle
from functools import partial
from pathlib import Path
import numpy as np, torch
from fedl2p.core.cohort import stack, CohortRunner
from fedl2p.core.finetune import InnerState, finetune, initial_running
from fedl2p.core.hypergradients import MetaProblem, Unrolled
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.meta_step import evaluate, personalize

torch.set_num_threads(1)
EST = Unrolled()

class Bench:
    def __init__(self, e, statistics=None, max_cohort=96):
        rt = e.runtime
        self.e, self.rt, self.model, self.origin = e, rt, rt.runner.model, rt.runner.origin
        self.statistics = statistics or rt.evaluation_statistics
        self.max_cohort = max_cohort
        self.seen, self.unseen = list(e.data.pool("seen")), list(e.data.pool("unseen"))
        self.ids = self.seen + self.unseen
        self.is_seen = torch.tensor([i in set(self.seen) for i in self.ids])
        self.tasks = [rt.personal_task(i, ("val", "test")) for i in self.ids]
        self.sizes = [e.data.client_sizes(i) for i in self.ids]
        self.clients = [e.data.clients[i] for i in self.ids]
        self.weights = torch.tensor([float(s[0]) for s in self.sizes])
        self.epochs = rt.finetune_epochs
        self.running = [initial_running(self.model, self.origin.buffers, t.statistics) for t in self.tasks]
        self.B, self.P = len(self.model.batchnorm_names), len(self.model.parameter_names)
        self._fold_cache = {}

    # recipes
    def net_recipes(self):
        r = [self.rt.recipe(self.e.state.best_lambda, i) for i in self.ids]
        return torch.stack([x.beta for x in r]), torch.stack([x.eta for x in r])

    def mean_recipe(self):
        b, t = self.net_recipes()
        s = self.is_seen
        n = len(self.ids)
        return b[s].mean(0).expand(n, -1).clone(), t[s].mean(0).expand(n, -1).clone()

    def fixed(self, beta, rate):
        n = len(self.ids)
        return torch.full((n, self.B), beta), torch.full((n, self.P), rate)

    # data: folds as (owner, train batches, val batches)
    def folds(self, kind):
        if kind in self._fold_cache:
            return self._fold_cache[kind]
        out = []
        for i, (t, (n, m, _)) in enumerate(zip(self.tasks, self.sizes)):
            if kind == "val":
                out.append((i, t.train_batches, t.val_batches))
            elif kind == "test":
                out.append((i, t.train_batches, t.test_batches))
            elif kind == "trainval_test":
                pass
            elif kind.startswith("cv"):  # cvK: K folds of the union at most; train size n' = n+m - fold
                x, y = union(t, n)
                total = n + m
                k = int(kind[2:] or 0) or max(2, round(total / m))
                g = torch.Generator().manual_seed(1000 + i)
                # first n are train, then val: keep own val as a fold where sizes allow
                parts = [torch.arange(n, total)]
                rest = torch.randperm(n, generator=g)
                if k > 1: parts += list(rest.chunk(k - 1))
                for p in parts:
                    keep = torch.ones(total, dtype=torch.bool); keep[p] = False
                    out.append((i, batches(x[keep], y[keep], self.epochs, self.rt.data.batch_size, g), [(x[p], y[p])]))
            elif kind.startswith("boot"):  # K random splits of the union, n to train and m to validate
                x, y = union(t, n)
                g = torch.Generator().manual_seed(2000 + i)
                for _ in range(int(kind[4:])):
                    p = torch.randperm(n + m, generator=g)
                    a, b = p[:n], p[n:]
                    out.append((i, batches(x[a], y[a], self.epochs, self.rt.data.batch_size, g), [(x[b], y[b])]))
            elif kind.startswith("half"):  # halves of the validation set: half0, half1
                x, y = cat(t.val_batches)
                s = slice(int(kind[4:]), None, 2)
                out.append((i, t.train_batches, [(x[s], y[s])]))
        self._fold_cache[kind] = out
        return out

    def _groups(self, folds):
        by = {}
        for k, (_, tr, va) in enumerate(folds):
            by.setdefault((tuple(x.shape for x, _ in tr), tuple(x.shape for x, _ in va)), []).append(k)
        for ks in by.values():
            for s in range(0, len(ks), self.max_cohort):
                yield ks[s:s + self.max_cohort]

    def hypergradient(self, beta, eta, folds="val", only=None):
        """(dbeta (N,B), deta (N,P), loss (N,)), means over each client's folds; `only`: bool mask of clients."""
        fs = self.folds(folds) if isinstance(folds, str) else folds
        if only is not None: fs = [f for f in fs if only[f[0]]]
        n = len(self.ids)
        db, de, lo, ct = torch.zeros(n, self.B), torch.zeros(n, self.P), torch.zeros(n), torch.zeros(n)
        def one(running, train, val, b, e):
            st = InnerState(self.origin.parameters, {**self.origin.buffers, **running})
            tuned = finetune(self.model, st, train, b, e, history=EST.history(len(train)))
            return EST(self.model, MetaProblem(tuned, train, train[0], val, b, e, self.statistics))
        for ks in self._groups(fs):
            own = torch.tensor([fs[k][0] for k in ks])
            r = torch.vmap(one, randomness="different")(stack([self.running[i] for i in own]), stack([fs[k][1] for k in ks]),
                                                       stack([fs[k][2] for k in ks]), beta[own], eta[own])
            w = float(sum(len(y) for _, y in fs[ks[0]][2]))
            db.index_add_(0, own, r.beta * w); de.index_add_(0, own, r.eta * w); lo.index_add_(0, own, r.val_loss * w)
            ct.index_add_(0, own, torch.full((len(own),), w))
        ct = ct.clamp(min=1)
        return db / ct[:, None], de / ct[:, None], lo / ct

    def loss(self, beta, eta, folds="val", only=None):
        return self._measure(beta, eta, self.folds(folds) if isinstance(folds, str) else folds, only)[1]

    def _measure(self, beta, eta, fs, only=None):
        n = len(self.ids)
        acc, lo, ct = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        if only is not None: fs = [f for f in fs if only[f[0]]]
        def one(running, train, val, b, e):
            st = InnerState(self.origin.parameters, {**self.origin.buffers, **running})
            tuned = personalize(self.model, st, train, Hyperparameters(b, e)).final
            out, loss, _ = evaluate(self.model, tuned, b, val, statistics=self.statistics)
            y = torch.cat([y for _, y in val])
            return (out.argmax(-1) == y).float().mean(), loss
        with torch.no_grad():
            for ks in self._groups(fs):
                own = torch.tensor([fs[k][0] for k in ks])
                a, l = torch.vmap(one, randomness="different")(stack([self.running[i] for i in own]), stack([fs[k][1] for k in ks]),
                                                              stack([fs[k][2] for k in ks]), beta[own], eta[own])
                w = float(sum(len(y) for _, y in fs[ks[0]][2]))
                acc.index_add_(0, own, a * w); lo.index_add_(0, own, l * w); ct.index_add_(0, own, torch.full((len(own),), w))
        ct = ct.clamp(min=1)
        return acc / ct, lo / ct

    def test(self, beta, eta):
        """(accuracy (N,), loss (N,))."""
        return self._measure(beta, eta, self.folds("test"))

    def pools(self, v):
        return v[self.is_seen].mean().item(), v[~self.is_seen].mean().item()

def cat(bs):
    return torch.cat([x for x, _ in bs]), torch.cat([y for _, y in bs])

def union(t, n):
    x, y = [], []
    got = 0
    for a, b in t.train_batches:
        x.append(a); y.append(b); got += len(b)
        if got >= n: break
    vx, vy = cat(t.val_batches)
    return torch.cat([*x, vx]), torch.cat([*y, vy])

def batches(x, y, epochs, size, g):
    out = []
    for _ in range(epochs):
        p = torch.randperm(len(y), generator=g)
        ends = [*range(size, len(y), size), len(y)]
        if len(ends) > 1 and len(y) - ends[-2] == 1: del ends[-2]
        s = 0
        for en in ends:
            out.append((x[p[s:en]], y[p[s:en]])); s = en
    return out

# refinement
def refine(bench, beta, eta, *, steps, rate=0.1, folds="val", rate_eta=None, search=False, radius=None, norm=None, prox=0.0, callback=None, only=None, scale=None):
    """Descent on (beta, log eta) by exact hypergradients; with `search` a step that does not lower the loss is undone and halved."""
    b0, e0 = beta.clone(), eta.clone()
    B = bench.B
    phi = torch.cat([b0, torch.zeros_like(e0)], 1)
    n = len(phi)
    r = torch.full((n, 1), rate)
    shape = torch.ones(B + bench.P) if scale is None else scale
    if rate_eta is not None: shape = torch.cat([torch.ones(B), torch.full((bench.P,), rate_eta / rate)])
    def split(p): return p[:, :B], e0 * p[:, B:].exp()
    best = None
    start = phi.clone()
    for k in range(steps + 1):
        if callback: callback(k, *split(phi))
        if k == steps and not search: break
        b, e = split(phi)
        db, de, lo = bench.hypergradient(b, e, folds, only)
        g = torch.cat([db, e * de], 1)
        if prox:
            d = phi - start
            lo = lo + prox / 2 * (d ** 2).sum(1); g = g + prox * d
        good = torch.isfinite(lo) & torch.isfinite(g).all(1)
        g = torch.where(good[:, None], g, torch.zeros_like(g))
        if search:
            lo = torch.where(good, lo, torch.full_like(lo, float("inf")))
            if best is None: best = (phi, lo, g)
            else:
                ok = lo < best[1]
                best = (torch.where(ok[:, None], phi, best[0]), torch.where(ok, lo, best[1]), torch.where(ok[:, None], g, best[2]))
                r = torch.where(ok[:, None], r * 1.2, r / 2)
            phi, _, g = best
            if k == steps: break
        step = -r * g * shape
        if norm is not None:
            size = step.norm(dim=1, keepdim=True)
            step = step * (norm / size.clamp(min=1e-12)).clamp(max=1)
        phi = phi + step
        phi = torch.cat([phi[:, :B].clamp(0, 1), phi[:, B:]], 1)
        if radius is not None:
            d = phi - start
            phi = start + d * (radius / d.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return split(phi)

def summary(rows):
    """rows: list over seeds of floats -> mean (95 % t interval over seeds)."""
    x = np.array(rows); n = len(x)
    t = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(n, 0)
    h = t * x.std(ddof=1) / n ** 0.5 if n > 1 else float("nan")
    return x.mean(), x.mean() - h, x.mean() + h
