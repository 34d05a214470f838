"""Eta-only backtracking refinement from mean, nets half and FT; JSON per seed. usage: seeds..."""
import sys, json, torch
from research.loadx import benchx
def run(seed, steps=3, keep=None):
    b = benchx(f"/tmp/research-runs/x-{seed}", keep); mb, me = b.mean_recipe(); nb, ne = b.net_recipes(); S, B = b.is_seen, b.B
    fb, fe = b.fixed(1.0, b.e.rates["ft_bn_i"]["rate"])
    out = {"is_seen": S.tolist()}
    def go(label, beta, eta):
        a, l = b.test(beta, eta); out[label] = [a.tolist(), l.tolist()]
        if label == "mean 0": go.base = (a, l)
        da, dl = 100 * (a - go.base[0]), l - go.base[1]
        print(f"{seed} {label:14s} acc {da[S].mean():+.2f} {da[~S].mean():+.2f} loss {dl[S].mean():+.4f} {dl[~S].mean():+.4f}", flush=True)
        json.dump(out, open(f"/tmp/research-runs/confirm-{seed}.json", "w"))
    go("mean 0", mb, me); go("nets", nb, ne)
    for label, b0, e0, n in (("mean", mb, me, steps), ("ft", fb, fe, 3)):
        delta = torch.zeros(len(mb), b.P); t = torch.full((len(mb), 1), 4.0); best = None
        if label != "mean": go(f"{label} 0", b0, e0)
        for k in range(n + 1):
            eta = e0 * delta.exp()
            _, de, lo = b.hypergradient(b0, eta); g = torch.nan_to_num(de * eta); lo = torch.nan_to_num(lo, nan=1e9, posinf=1e9)
            if best is None: best = (delta, lo, g)
            else:
                ok = lo < best[1]; t = torch.where(ok[:, None], t, t / 4)
                best = tuple(torch.where(ok.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip((delta, lo, g), best))
                go(f"{label} {k}", b0, e0 * best[0].exp())
            delta = (best[0] - (t * best[2]).clamp(-.35, .35)).clamp(-1.1, 1.1)
run(sys.argv[1], int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else None)
