import sys, torch, numpy as np
torch.set_printoptions(precision=3, sci_mode=False, linewidth=180)
D = {int(s): torch.load(f"/tmp/research-runs/collect-{s}.pt") for s in sys.argv[1:]}
for s, d in D.items():
    print(f"== {s}")
    gv, gt, gs = d["g_val"], d["g_test"], d["g_swap"]
    for nm, m in (("seen", d["is_seen"]), ("unseen", ~d["is_seen"]), ("all", torch.ones(len(gv), dtype=torch.bool))):
        a, t = gv[m], gt[m]
        print(nm, "mean g_val", a.mean(0).numpy().round(3), "g_test", t.mean(0).numpy().round(3))
        ac, tc = a - a.mean(0), t - t.mean(0)
        cov = (ac * tc).mean(0); print("   sd val", ac.std(0).numpy().round(3), "\n   corr val/test", (cov / ac.std(0) / tc.std(0)).numpy().round(2), "corr swap/test", (((gs[m]-gs[m].mean(0))*tc).mean(0)/gs[m].std(0)/tc.std(0)).numpy().round(2), "signal sd", cov.clamp(min=0).sqrt().numpy().round(3))
    base = d["scale1.0/test"]
    for k in d:
        if "/test" in k:
            a, l = d[k]; S = d["is_seen"]
            vl = d[k.replace("/test", "/val")][1]; sw = d[k.replace("/test", "/swap")][1]
            dv, dt, ds = vl - d["scale1.0/val"][1], l - base[1], sw - d["scale1.0/swap"][1]
            c = lambda x, y: np.corrcoef(x, y)[0, 1] if x.std() > 0 else 0
            print(f"{k:16s} acc {100*(a-base[0])[S].mean():+.2f} {100*(a-base[0])[~S].mean():+.2f} loss {dt[S].mean():+.4f} {dt[~S].mean():+.4f}  sd of dloss test {dt.std():.3f} corr val-test {c(dv,dt):+.2f} swap-test {c(ds,dt):+.2f}")
