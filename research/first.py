import sys, time, torch
from research.load import bench
from research.bench import refine
b = bench(int(sys.argv[1]))
t=time.time(); nb, ne = b.net_recipes(); mb, me = b.mean_recipe()
ft = b.fixed(1.0, b.e.rates["ft_bn_i"]["rate"])
print(b.model.parameter_names, b.model.batchnorm_names)
print("mean", mb[0], me[0]); print("sd over clients", nb.std(0), ne.std(0))
base = b.test(mb, me); print("mean recipe acc", b.pools(base[0]), "loss", b.pools(base[1]), time.time()-t)
def show(label, r):
    a, l = b.test(*r)
    print(f"{label:40s} acc {100*(b.pools(a)[0]-b.pools(base[0])[0]):+.2f} {100*(b.pools(a)[1]-b.pools(base[0])[1]):+.2f}  loss {b.pools(l)[0]-b.pools(base[1])[0]:+.4f} {b.pools(l)[1]-b.pools(base[1])[1]:+.4f}", flush=True)
show("ft", ft); show("nets", (nb, ne))
for folds in ("val", "cv", "test"):
    t=time.time()
    marks={}
    refine(b, mb, me, steps=20, rate=0.1, folds=folds, callback=lambda k,x,y: marks.update({k:(x,y)}) if k in (5,10,20) else None)
    for k in marks: show(f"{folds} {k}", marks[k])
    print(time.time()-t)
