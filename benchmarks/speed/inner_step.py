"""One inner step of ResNet-18 at 32x32, batch of 32, against the authors' order of operations.

Run:  python -m benchmarks.speed.inner_step
Time: two minutes on 2 cores, most of it for the compiler.
"""

import torch
from torch import nn
from torch.autograd.profiler_util import EventList
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import reference
from benchmarks.speed.cases import Client
from benchmarks.speed.measure import Row, command, in_turns
from fedl2p.core.differentiation import CompiledSteps

KERNELS = ("conv", "mm", "linear")
AGAINST = "reference loop"


def measure(quick: bool) -> list[Row]:
    """The step in float32, bf16 and compiled, a step with ordinary batch norms, and how much of it is in kernels."""
    client = Client()
    repeats = 5 if quick else 15
    rates = dict(zip(client.model.parameter_names, client.eta.unbind(), strict=True))
    naive = reference.with_mixed_batch_norms(client.copy(), client.beta).train()
    ordinary = client.copy().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it

    def ours() -> None:
        client.differentiation.inner_step(client.model, client.state, client.train[0], client.beta, rates)

    def half() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours()

    steps = CompiledSteps()

    def compiled() -> None:
        steps.inner_step(client.model, client.state, client.train[0], client.beta, rates)

    def theirs() -> None:
        reference.inner_step(naive, client.train[0], client.eta)

    def plain() -> None:
        _plain_step(ordinary, client)

    shares = {}
    for name, step in (("float32", ours), ("bf16", half)):
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
        shares[name] = f"{_kernel_share(profiled.key_averages()):.0%} in convolutions and matrix products (target: 80%)"
    return [
        in_turns("inner step", ours, theirs, against=AGAINST, repeats=repeats, note=shares["float32"]),
        in_turns("inner step, bf16-mixed", half, theirs, against=AGAINST, repeats=repeats, note=shares["bf16"][:3]),
        in_turns(
            "inner step, compiled", compiled, theirs, against=AGAINST, repeats=repeats, note="compiled in a minute"
        ),
        in_turns("inner step", ours, plain, against="ordinary BatchNorm2d, channels_last", repeats=repeats),
    ]


def _plain_step(model: nn.Module, client: Client) -> None:
    inputs = client.train[0][0].contiguous(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(cross_entropy(model(inputs), client.train[0][1]), parameters)
    torch._foreach_add_([p.data for p in parameters], gradients, alpha=-0.01)  # type: ignore[arg-type]  # tuples will do


def _kernel_share(events: EventList) -> float:
    """The share of the time that convolutions and matrix products take."""
    inside = sum(e.self_cpu_time_total for e in events if any(word in e.key for word in KERNELS))
    return float(inside / sum(e.self_cpu_time_total for e in events))


if __name__ == "__main__":
    command(__doc__, measure)
