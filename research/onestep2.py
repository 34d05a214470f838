"""Key one-step variants; val gradient cached. usage: seeds..."""
import sys, torch
from research.load import bench
from research.bench import summary
V = {}
def clip(x, c): return x.clamp(-c, c)
def run(seed):
    d = torch.load(f"/tmp/research-runs/collect-{seed}.pt"); b = bench(seed)
    mb, me, S = d["mb"], d["me"], d["is_seen"]; B = b.B
    base = d["scale1.0/test"]
    n, m = d["sizes"][:, :1].float(), d["sizes"][:, 1:2].float()
    gv, gs = d["g_val"], d["g_swap"]
    gvs = (m * gv + n * gs) / (n + m)
    def go(label, delta):
        a, l = b.test((mb + delta[:, :B]).clamp(0, 1), me * delta[:, B:].exp())
        da, dl = 100 * (a - base[0]), l - base[1]
        V.setdefault(label, []).append((da[S].mean().item(), da[~S].mean().item(), dl[S].mean().item(), dl[~S].mean().item()))
    wb = torch.tensor([1.] * B + [0.] * b.P); we = 1 - wb
    for t in (2, 4, 8): go(f"val eta t={t} clip.7", clip(-t * gv * we, .7))
    go("val eta t=4, beta .2", clip(-4 * gv * we, .7) + clip(-.2 * gv * wb, .1))
    go("val+swap eta t=4", clip(-4 * gvs * we, .7)); go("val+swap eta t=8", clip(-8 * gvs * we, .7))
    go("mean g (seen) eta t=4", clip(-4 * gv[S].mean(0).expand_as(gv) * we, .7))
    go("centred val eta t=4", clip(-4 * (gv - gv[S].mean(0)) * we, .7))
    dn = torch.cat([d["nb"] - mb, (d["ne"] / me).clamp(min=.05).log()], 1)
    go("nets log s=.5", .5 * dn); go("nets log s=1", dn); go("nets log s=.5 eta only", .5 * dn * we); go("nets s=.5 beta only", .5 * dn * wb)
    go("nets s=.5 + val eta t=4", .5 * dn + clip(-4 * gv * we, .7))
for s in sys.argv[1:]: run(int(s))
for k, r in V.items():
    z = [summary([x[i] for x in r])[0] for i in range(4)]
    print(f"{k:28s} acc {z[0]:+.2f} {z[1]:+.2f}  loss {z[2]:+.4f} {z[3]:+.4f} | each acc {[(round(x[0],1), round(x[1],1)) for x in r]} loss {[(round(x[2],3), round(x[3],3)) for x in r]}")
