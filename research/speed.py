import time, torch
from research.load import bench
b = bench(100); mb, me = b.mean_recipe()
b.hypergradient(mb, me)
for c in (96, 32, 12, 6):
    b.max_cohort = c
    t = time.process_time(); b.hypergradient(mb, me); h = time.process_time() - t
    t = time.process_time(); b.test(mb, me); print(c, h, time.process_time() - t, flush=True)
