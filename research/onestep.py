"""One-step variants from cached gradients, forward passes only. usage: seeds..."""
import sys, torch, json
from research.load import bench
from research.bench import summary
V = {}
def run(seed):
    d = torch.load(f"/tmp/research-runs/collect-{seed}.pt"); b = bench(seed)
    mb, me, S = d["mb"], d["me"], d["is_seen"]; B = b.B
    base = b.test(mb, me)
    n, m = d["sizes"][:, :1].float(), d["sizes"][:, 1:2].float()
    gv, gs, gt = d["g_val"], d["g_swap"], d["g_test"]
    gvs = (m * gv + n * gs) / (n + m)
    def clip(x, c): return x * (c / x.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
    def go(label, delta):
        a, l = b.test((mb + delta[:, :B]).clamp(0, 1), me * delta[:, B:].exp())
        da, dl = 100 * (a - base[0]), l - base[1]
        V.setdefault(label, []).append((da[S].mean().item(), da[~S].mean().item(), dl[S].mean().item(), dl[~S].mean().item()))
    mean_g = gv[S].mean(0, keepdim=True)
    for nm, g in (("val", gv), ("val+swap", gvs), ("val centred", gv - mean_g), ("test", gt)):
        for t in (0.5, 1.0, 2.0):
            go(f"{nm} t={t} clip.3", clip(-t * g, 0.3))
        if nm in ("val", "val+swap"):
            be = g.clone(); be[:, B:] = 0; et = g.clone(); et[:, :B] = 0
            go(f"{nm} beta only t=1 clip.3", clip(-be, 0.3)); go(f"{nm} eta only t=1", clip(-et, .3)); go(f"{nm} eta only t=4", clip(-4 * et, .5))
            go(f"{nm} t=1,eta x4 clip.3", clip(-torch.cat([g[:, :B], 4 * g[:, B:]], 1), 0.3))
            go(f"{nm} t=.5,eta x8 clip.3", clip(-.5*torch.cat([g[:, :B], 8 * g[:, B:]], 1), 0.3))
    go("mean g_val seen t=1", -gv[S].mean(0).expand_as(gv)); 
    dn = torch.cat([d["nb"] - mb, (d["ne"] / me).clamp(min=.05).log()], 1)
    go("nets log s=.5", .5 * dn); go("nets log s=1", dn)
    go("nets s=.5 + val t=1 clip.3", .5 * dn + clip(-gv, .3))
for s in sys.argv[1:]: run(int(s))
for k, r in V.items():
    print(f"{k:32s} acc {summary([x[0] for x in r])[0]:+.2f} {summary([x[1] for x in r])[0]:+.2f}  loss {summary([x[2] for x in r])[0]:+.4f} {summary([x[3] for x in r])[0]:+.4f}   each unseen loss {[round(x[3],3) for x in r]} seen loss {[round(x[2],3) for x in r]}")
