"""The page's second half: how it was learned, what was learned, and what it cost."""

import math
from html import escape
from itertools import pairwise

import numpy as np
from omegaconf import OmegaConf

from fedl2p.pools import ROLES
from fedl2p.report.domains import agreements, distance_maps
from fedl2p.report.figures.domains import distance_map
from fedl2p.report.figures.recipes import hyperparameter_boxes
from fedl2p.report.figures.split import split_panel
from fedl2p.report.figures.training import learning_curve
from fedl2p.report.page.html import Chapter, folded, gallery, heads, note, percent, row, table
from fedl2p.report.recipes import KINDS, LIMITS, Kind, at_limits, by_domain, layer_spreads, model_sparsity
from fedl2p.report.split import label_skew, labels_known
from fedl2p.report.table import NOTHING, number

MAX_DOMAINS = 12  # that get figures of their own
SYMBOLS = {"beta": "β", "eta": "η"}


def training(chapter: Chapter) -> str:
    """The learning curve."""
    history = chapter.run.history
    return gallery([chapter.figure(learning_curve(history))]) if history else ""


def recipes(chapter: Chapter) -> str:
    """The paper's Figures 2 and 4: beta and eta by layer, over all clients and by domain, with the sparsity."""
    rows = chapter.run.recipes
    if not rows:
        return ""
    sizes = (chapter.run.results.get("cost") or {}).get("parameters")
    domains = by_domain(rows)
    content = note(_limits(chapter)) + _sparsity_table(chapter)
    for kind in KINDS:
        values = [number(entry["value"]) for entry in rows if entry["kind"] == kind]
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            continue
        low, high = min(0.0, *finite), max(0.0, *finite)
        margin = 0.03 * ((high - low) or 1.0)
        limits = (low - margin, high + margin)  # the same for all domains
        shown = gallery([chapter.figure(hyperparameter_boxes(rows, kind, limits=limits, sizes=sizes))])
        if len(domains) > 1:
            parts = [
                chapter.figure(hyperparameter_boxes(own, kind, group=domain, limits=limits, sizes=sizes))
                for domain, own in list(domains.items())[:MAX_DOMAINS]
            ]
            left = f" (the first {MAX_DOMAINS} of {len(domains)})" if len(domains) > MAX_DOMAINS else ""
            shown += folded(f"{SYMBOLS[kind]} by domain{left}", gallery(parts))
        content += shown + folded(f"{SYMBOLS[kind]} by layer in numbers", _layers(chapter, kind))
    return content


def _limits(chapter: Chapter) -> str:
    """Names the layers at a limit."""
    words = {("beta", 0.0): "β is 0 (pretrained statistics alone)", ("beta", 1.0): "β is 1 (the client's alone)"}
    groups: dict[str, list[str]] = {}
    for kind, layer, limit, share in at_limits(chapter.run.recipes):
        text = words.get((kind, limit), "η is 0 (left as it was)")
        groups.setdefault(text, []).append(f"{layer} ({100 * share:.0f} %)")
    if not groups:
        return "No layer is at a limit with half of the clients: β at 0 or 1, η at 0."
    return "Layers at a limit, with the share of the clients: " + "; ".join(
        f"{text}: {', '.join(layers)}" for text, layers in groups.items()
    )


def _sparsity_table(chapter: Chapter) -> str:
    rows = chapter.run.recipes
    sizes = (chapter.run.results.get("cost") or {}).get("parameters")
    pools = list(dict.fromkeys(str(entry["pool"]) for entry in rows))
    body = []
    domains = by_domain(rows)
    for domain, own in {"all": list(rows), **(domains if len(domains) > 1 else {})}.items():
        shares = [model_sparsity([entry for entry in own if entry["pool"] == pool], sizes) for pool in pools]
        body.append(row(escape(domain), *(percent(share) for share in shares)))
    weight = "values" if sizes else "tensors"
    caption = f"Sparsity: the share of the model's {weight} whose η is exactly 0, in %, by domain and pool."
    return table(heads("Domain", *pools), body, caption)


def _layers(chapter: Chapter, kind: Kind) -> str:
    body = []
    for spread in layer_spreads(chapter.run.recipes, kind):
        low, first, middle, third, high = spread.quartiles
        shares = [percent(spread.share_at(limit)) for limit in LIMITS[kind]]
        body.append(row(escape(spread.layer), *(f"{v:.4g}" for v in (low, first, middle, third, high)), *shares))
    limits = [f"% at {limit:g}" for limit in LIMITS[kind]]
    columns = heads("Layer", "min", "quarter", "median", "three quarters", "max", *limits)
    return table(columns, body, "Over all clients; layers in the model's order.", sortable=True)


def domains(chapter: Chapter) -> str:
    """The paper's Table 6 and Figures 3 and 5."""
    found = agreements(chapter.run)
    if not any(math.isfinite(entry.index) for entry in found):
        several = len({domain for _, domain in chapter.run.who.values()}) > 1
        return note("Nothing to compare: there are no more clients than domains.") if several and found else ""
    features = list(dict.fromkeys(entry.feature for entry in found))
    body = []
    for pool in dict.fromkeys(entry.pool for entry in found):
        own = {entry.feature: entry for entry in found if entry.pool == pool}
        values = [own[f].index if f in own else math.nan for f in features]
        clients = max(entry.clients for entry in own.values())
        body.append(
            row(f"{escape(pool)}, n = {clients}", *(f"{v:.2f}" if math.isfinite(v) else NOTHING for v in values))
        )
    caption = (
        "Adjusted Rand index between the clients' domains and a spectral clustering of them into as many groups: 1 "
        "where the groups are the domains, about 0 where they have nothing to do with them."
    )
    content = table(heads("Clients", *(f"{f.net} {f.side} ({f.symbol})" for f in features)), body, caption)
    maps = [
        chapter.figure(distance_map(feature, names, values)) for feature, names, values in distance_maps(chapter.run)
    ]
    if maps:
        content += note(
            "Maps: the log of the mean distance between clients of two domains over the geometric mean of the "
            "distances within them. Above 0 (blue): the two domains are told apart; about 0: they are not."
        )
    return content + gallery(maps)


def failures(chapter: Chapter) -> str:
    """Who was left out of which rounds, and why."""
    found: dict[tuple[str, str], list[int]] = {}
    for record in chapter.run.history:
        for client, reason in (record.get("failures") or {}).items():
            found.setdefault((str(client), str(reason)), []).append(record.get("round") or 0)
    body = [
        row(escape(_ranges(rounds)), escape(client), escape(reason), text=True)
        for (client, reason), rounds in found.items()
    ]
    columns = heads("Round", "client", "reason", text=True)
    return table(columns, body, "They were left out of their round's average.", sortable=True)


def _ranges(rounds: list[int]) -> str:
    """Whole numbers, runs of them joined: `3, 5 to 9`."""
    parts, start = [], rounds[0]
    for current, following in pairwise([*rounds, math.inf]):
        if following != current + 1:
            parts.append(f"{start}" if start == current else f"{start} to {current:g}")
            start = int(following) if math.isfinite(following) else start
    return ", ".join(parts)


def split(chapter: Chapter) -> str:
    """Who has what, as `fedl2p data` shows it."""
    clients = chapter.run.clients
    if not clients:
        return ""
    body = []
    for pool in dict.fromkeys(client.pool for client in clients):
        own = [client for client in clients if client.pool == pool]
        sizes = np.array([client.sizes for client in own])
        low, middle, high = sizes[:, 0].min(), np.median(sizes[:, 0]), sizes[:, 0].max()
        each = f"{low}" if low == high else f"{low} to {high} ({middle:g})"
        skew = f"{label_skew(own):.2f}" if labels_known(own) else NOTHING
        domains = str(len({client.domain for client in own}))
        body.append(row(escape(pool), str(len(own)), domains, *(str(total) for total in sizes.sum(axis=0)), each, skew))
    caption = (
        "Samples by role; train each: smallest to largest training set (median); skew: how far a client's labels are "
        "from those of its pool, 0 (alike) to 1 (disjoint)."
    )
    columns = heads("Pool", "clients", "domains", *ROLES, "train each", "skew")
    return table(columns, body, caption) + gallery([chapter.figure(split_panel(clients, chapter.run.classes))])


def config(chapter: Chapter) -> str:
    """The configuration as YAML."""
    given = chapter.run.results.get("config")
    if not given:
        return ""
    text = given if isinstance(given, str) else OmegaConf.to_yaml(OmegaConf.create(dict(given)))
    return f'<pre tabindex="0">{escape(text)}</pre>\n'
