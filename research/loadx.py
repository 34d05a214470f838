"""Any finished run's folder as a Bench (its own config), for clients that are kept."""
from pathlib import Path
from types import SimpleNamespace
import json, torch
from fedl2p.experiment.config import load_config
from fedl2p.experiment.build import build_data, build_model, build_runtime
from fedl2p.federation.checkpoint import load_tensors
from research.bench import Bench

def benchx(folder, keep=None, **kw):
    f = Path(folder); cfg = load_config([str(f / "config.yaml")])
    data, model = build_data(cfg), build_model(cfg)
    model.load_state_dict(load_tensors(f / "global_model.safetensors")); model.eval()
    rt = build_runtime(cfg, data, model, base_lr=0.0)
    nets = load_tensors(f / "meta_nets.safetensors")
    buffers = dict(rt.meta_nets.named_buffers())
    for n, b in buffers.items(): b.copy_(nets[n])
    best = {n: t for n, t in nets.items() if n not in buffers}
    rates = json.load(open(f / "checkpoints/tuning.json"))
    seen, unseen = data.pool("seen"), data.pool("unseen")
    pools = {"seen": seen[::keep[0]], "unseen": unseen[::keep[1]]} if keep else {"seen": seen, "unseen": unseen}
    shim = SimpleNamespace(pool=lambda name: pools[name], client_sizes=data.client_sizes, clients=data.clients)
    rt.data = data
    e = SimpleNamespace(runtime=rt, data=shim, state=SimpleNamespace(best_lambda=best), rates=rates)
    return Bench(e, **kw)
