"""Trains FedL2P on seeds and keeps the run folders; `load` gives the finished run back."""
import sys, time
from pathlib import Path
from fedl2p.experiment.config import load_config
from fedl2p.experiment.stages import Experiment

ROOT = Path("/tmp/research-runs")

def load(seed, config="configs/digits.yaml", name="seed", overrides=()):
    out = ROOT / f"{name}-{seed}"
    cfg = load_config([config, f"seed={seed}", f"output_dir={out}", "baselines.l2p=false", "baselines.shuffled=false", *overrides])
    e = Experiment(cfg, resume=out.exists())
    e.run()
    return e

if __name__ == "__main__":
    for s in sys.argv[1:]:
        t = time.time(); e = load(int(s))
        for k, m in e.methods.items():
            print(s, k, {p: (round(v.accuracy, 4), round(v.loss, 4)) if hasattr(v, "accuracy") else v.keys() if hasattr(v,'keys') else str(v)[:200] for p, v in m.pools.items()}, flush=True)
        print(s, time.time() - t, flush=True)
