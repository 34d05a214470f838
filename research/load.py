"""A finished run as a Bench, without measuring the methods again; pickled pieces make it quick."""
from research.train import ROOT
from fedl2p.experiment.config import load_config
from fedl2p.experiment.stages import Experiment
from fedl2p.experiment.build import build_runtime
from fedl2p.federation.checkpoint import load_state, load_tensors
from research.bench import Bench

def bench(seed, config="configs/digits.yaml", name="seed", overrides=(), **kw):
    out = ROOT / f"{name}-{seed}"
    cfg = load_config([config, f"seed={seed}", f"output_dir={out}", "baselines.l2p=false", "baselines.shuffled=false", *overrides])
    e = Experiment(cfg, resume=True)
    e.model = e._pretrained()
    e.runtime = build_runtime(cfg, e.data, e.model, base_lr=0.0)
    e.rates = e.folder.read_json("checkpoints/tuning.json")
    e.state = load_state(e.folder.checkpoints)
    nets = load_tensors(out / "meta_nets.safetensors")
    for n, b in e.runtime.meta_nets.named_buffers(): b.copy_(nets[n])
    return Bench(e, **kw)
