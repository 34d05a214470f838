"""Expected error as the loss that refinement lowers; several steps with backtracking. usage: seeds..."""
import sys, torch
from dataclasses import replace
from pathlib import Path
from research.load import bench
from research.bench import summary
from fedl2p.core.functional import expected_error
V = {}
def corr(a, t):
    a, t = a - a.mean(0), t - t.mean(0)
    return ((a * t).mean(0) / a.std(0) / t.std(0)).numpy().round(2)
def run(seed):
    b = bench(seed); mb, me = b.mean_recipe(); nb, ne = b.net_recipes(); S, B = b.is_seen, b.B
    base = b.test(mb, me); ce = b.model; ee = replace(ce, val_loss_fn=expected_error)
    wb = torch.tensor([1.] * B + [0.] * b.P); we = 1 - wb
    def go(label, beta, eta):
        a, l = b.test(beta, eta); da, dl = 100 * (a - base[0]), l - base[1]
        V.setdefault(label, []).append((da[S].mean().item(), da[~S].mean().item(), dl[S].mean().item(), dl[~S].mean().item()))
    def move(delta, b0=mb, e0=me): return (b0 + delta[:, :B]).clamp(0, 1), e0 * delta[:, B:].exp()
    def grad(model, beta, eta, f="val"):
        b.model = model; db, de, lo = b.hypergradient(beta, eta, f); b.model = ce
        return torch.cat([db, de * eta], 1), lo
    g, _ = grad(ee, mb, me); gt, _ = grad(ee, mb, me, "test")
    print(seed, "ee corr val/test", corr(g, gt), "sd", g.std(0).numpy().round(3), flush=True)
    for t in (4, 8, 16): go(f"ee eta t={t}", *move((-t * g * we).clamp(-.7, .7)))
    go("ee eta t=8, beta 1", *move((-8 * g * we).clamp(-.7, .7) + (-1 * g * wb).clamp(-.15, .15)))
    for label, b0, e0 in (("mean", mb, me), ("half nets", mb + .5 * (nb - mb), me * ((ne / me).clamp(min=.05).log() * .5).exp())):
        # backtracking descent on eta alone: t doubles on success, a quarter on failure
        delta = torch.zeros(len(mb), b.P + B); t = torch.full((len(mb), 1), 4.0)
        go(f"{label} ce steps=0", *move(delta, b0, e0))
        best = None
        for k in range(4):
            g, lo = grad(ce, *move(delta, b0, e0)); g = torch.nan_to_num(g * we)
            if best is None: best = (delta, lo, g)
            else:
                ok = lo < best[1]
                t = torch.where(ok[:, None], t, t / 4)
                best = tuple(torch.where(ok.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip((delta, lo, g), best))
                go(f"{label} ce accepted after {k}", *move(best[0], b0, e0))
            delta = (best[0] - (t * best[2]).clamp(-.35, .35)).clamp(-1.1, 1.1)
for s in sys.argv[1:]:
    run(int(s))
for k, r in V.items():
    z = [summary([x[i] for x in r])[0] for i in range(4)]
    print(f"{k:28s} acc {z[0]:+.2f} {z[1]:+.2f}  loss {z[2]:+.4f} {z[3]:+.4f} | each acc {[(round(x[0],1), round(x[1],1)) for x in r]} loss {[(round(x[2],3), round(x[3],3)) for x in r]}")
