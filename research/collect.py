"""Per seed, at the mean recipe: gradients on val, test, swapped folds; losses on grids of recipes; features."""
import sys, torch
from research.load import bench
from research.bench import refine, cat
from fedl2p.core.functional import FunctionalModel

def features(b):
    rows = []
    for t, s in zip(b.tasks, b.sizes):
        x, y = cat(t.train_batches[:1]) if s[0] <= b.rt.data.batch_size else cat(t.train_batches)
        p, q = b.origin
        f = []
        q = {**q, **b.running[0]}
        for beta in (0.0, 0.5, 1.0):
            with torch.no_grad():
                out, _ = b.model(p, q, torch.full((b.B,), beta), x, training=False, batch_statistics=True)
            f += [torch.nn.functional.cross_entropy(out, y), (out.argmax(-1) == y).float().mean()]
        c = torch.bincount(y, minlength=b.rt.data.num_classes).float(); c = c / c.sum()
        f += [-(c * (c + 1e-9).log()).sum(), torch.tensor(float(s[0])).log()]
        xi, mom, _ = t.statistics.net_inputs()
        rows.append(torch.cat([torch.stack(f), xi.log1p(), mom]))
    return torch.stack(rows)

def main(seed):
    b = bench(seed)
    nb, ne = b.net_recipes(); mb, me = b.mean_recipe()
    out = {"is_seen": b.is_seen, "sizes": torch.tensor(b.sizes), "nb": nb, "ne": ne, "mb": mb, "me": me, "features": features(b),
           "severity": torch.tensor([c.details.get("severity", 0.0) for c in b.clients])}
    for f in ("val", "test", "swap"):
        if f == "swap":
            fs = []
            for i, (t, s) in enumerate(zip(b.tasks, b.sizes)):
                vx, vy = cat(t.val_batches)
                tx, ty = t.train_batches[0]
                fs.append((i, [(vx, vy)] * b.epochs, [(tx, ty)]))
            b._fold_cache["swap"] = fs
        db, de, lo = b.hypergradient(mb, me, f)
        out[f"g_{f}"], out[f"l_{f}"] = torch.cat([db, de * me], 1), lo
    out["acc"] = b.test(mb, me)[0]
    def grid(label, beta, eta):
        for f in ("val", "test", "swap"):
            a, l = b._measure(beta, eta, b.folds(f))
            out[f"{label}/{f}"] = torch.stack([a, l])
    for s in (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0): grid(f"scale{s}", mb, me * s)
    for d in (-0.6, -0.4, -0.2, 0.1): grid(f"beta{d}", (mb + d).clamp(0, 1), me)
    for s in (0.25, 0.5, 0.75, 1.0): grid(f"net{s}", mb + s * (nb - mb), me + s * (ne - me))
    ft = b.fixed(1.0, b.e.rates["ft_bn_i"]["rate"]); grid("ft", *ft)
    torch.save(out, f"/tmp/research-runs/collect-{seed}.pt")

for s in sys.argv[1:]: main(int(s)); print(s, "done", flush=True)
