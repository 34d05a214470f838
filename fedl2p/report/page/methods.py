"""The page's first half: what was reached, by method and by client."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from fedl2p.report.figures.accuracy import accuracy_bars, gain_figure
from fedl2p.report.gains import METHOD, best_baseline, client_gains, gains_by_domain
from fedl2p.report.page.html import Chapter, fixed, gallery, heads, note, percent, plain, row, table
from fedl2p.report.table import NOTHING, cells, method_label, number, pool_names


def head(chapter: Chapter) -> str:
    """In one paragraph: seed, rounds, losses, failures, and whether the run came to its end."""
    run, rounds = chapter.run, chapter.run.rounds
    facts = [f"seed {escape(str(run.results['seed']))}"] if "seed" in run.results else []
    if rounds:
        facts.append(f"{plain(rounds.get('last'))} rounds, the best was {plain(rounds.get('best'))}")
        first, best = number(rounds.get("first_val_loss")), number(rounds.get("best_val_loss"))
        facts.append(f"validation loss from {fixed(first)} to {fixed(best)}")
        facts.append(f"failed clients: {plain(rounds.get('failures', 0))}")
    line = f'<p class="soft">{"; ".join(facts)}</p>\n' if facts else ""
    if not run.finished:
        line += '<p class="warning">This run has not come to its end; shown is what it had written.</p>\n'
    return line


def methods(chapter: Chapter) -> str:
    """Every method on every pool: mean and SD over clients, the spread, the loss; and the same as a figure."""
    results = chapter.run.results
    pools, measured = pool_names(results), cells(results)
    if not pools:
        return ""
    counts = {pool: max(row[pool].count for row in measured.values() if pool in row) for pool in pools}
    columns = [title for pool in pools for title in (f"{pool}, n = {counts[pool]}", "loss")]
    body = []
    for name, found in measured.items():
        single = {key: value for key, value in settings(results, name).items() if not isinstance(value, list)}
        small = ", ".join(f"{escape(str(key).replace('_', ' '))} {plain(value)}" for key, value in single.items())
        first = f"{escape(method_label(results, name))}{f'<small>{small}</small>' if small else ''}"
        line = []
        for pool in pools:
            if pool not in found:
                line += [NOTHING, NOTHING]
                continue
            best = ' class="best"' if found[pool].best else ""
            line += [f"<td{best}>{found[pool].text}{_spread(results, name, pool)}</td>", fixed(found[pool].loss)]
        body.append(row(first, *line))
    caption = (
        "Accuracy in %, mean ± SD over clients, after personalization on test data; small: median, and lowest to "
        "highest client; the best in each column is bold."
    )
    figure = gallery([chapter.figure(accuracy_bars(results))])
    return table(heads("Method", *columns), body, caption, sortable=True) + figure


def _spread(results: Mapping[str, Any], method: str, pool: str) -> str:
    accuracy = (results["methods"][method][pool] or {}).get("accuracy") or {}
    low, middle, high = (100 * number(accuracy.get(key)) for key in ("min", "median", "max"))
    return f"<small>{middle:.1f} ({low:.1f} to {high:.1f})</small>" if math.isfinite(low + middle + high) else ""


def settings(results: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """What a method was set to."""
    return (results["methods"][method] or {}).get("settings") or {}


def differences(chapter: Chapter) -> str:
    """FedL2P minus each other method, with intervals."""
    results, body = chapter.run.results, []
    for entry in results.get("comparisons") or ():
        mean, low, high = (100 * number(entry.get(key)) for key in ("mean", "low", "high"))
        interval = f"{low:+.1f} to {high:+.1f}" if math.isfinite(low) and math.isfinite(high) else NOTHING
        names = [escape(method_label(results, str(entry.get(key)))) for key in ("a", "b")]
        difference = f"{mean:+.1f}" if math.isfinite(mean) else NOTHING
        body.append(row(f"{names[0]} minus {names[1]}", escape(str(entry.get("pool"))), difference, interval))
    caption = (
        "Difference of accuracies in percentage points, client by client; 95 % bootstrap interval over the clients."
    )
    return table(heads("Methods", "pool", "difference", "interval"), body, caption, sortable=True)


def gains(chapter: Chapter) -> str:
    """What each client gains over its best baseline: a figure a pool, and a table by domain."""
    results, figures, said = chapter.run.results, [], []
    for pool in pool_names(results):
        found = client_gains(results, pool)
        if not found:
            continue
        figures.append(chapter.figure(gain_figure(pool, found, results)))
        best = best_baseline(results, pool)
        if best is not None:
            own = cells(results)[METHOD][pool].accuracy - cells(results)[best][pool].accuracy
            label = method_label(results, best)
            said.append(f"on {pool} clients {100 * own:+.1f} over {label}, the best single baseline")
    body = [
        row(escape(domain), escape(pool), str(s.count), f"{s.mean:+.1f}", str(s.better), str(s.equal), str(s.worse))
        for (pool, domain), s in gains_by_domain(results, chapter.run.who).items()
    ]
    caption = "Mean gain in points over each client's own best baseline, and for how many clients FedL2P is ahead."
    columns = heads("Domain", "pool", "clients", "gain", "better", "equal", "worse")
    summary = note(f"Mean gain in points: {'; '.join(said)}.") if said else ""
    return summary + gallery(figures) + table(columns, body, caption, sortable=True)


def rates(chapter: Chapter) -> str:
    """Which rates were tried for the methods that have one, and how they did."""
    results, body = chapter.run.results, []
    for name in results.get("methods") or {}:
        own, tried = settings(results, name), []
        for rate, loss in own.get("grid") or ():
            text = f"{rate:.3g}: {fixed(number(loss)) if math.isfinite(number(loss)) else 'diverges'}"
            tried.append(f"<b>{text}</b>" if rate == own.get("rate") else text)
        if tried:
            body.append(row(escape(method_label(results, name)), ", ".join(tried), text=True))
    caption = "Each with the validation loss of the seen clients; the rate in bold is the one that was taken."
    return table(heads("Method", "rates tried", text=True), body, caption)


def client_tables(chapter: Chapter) -> str:
    """Every client's accuracy by method, a folded table a pool."""
    return "".join(_clients(chapter, pool) for pool in pool_names(chapter.run.results))


def _clients(chapter: Chapter, pool: str) -> str:
    results, who = chapter.run.results, chapter.run.who
    per_method: dict[str, Mapping[str, Any]] = {}
    for name, entry in results["methods"].items():
        clients = ((entry or {}).get(pool) or {}).get("clients") or {}
        if clients:
            per_method[name] = clients
    names = dict.fromkeys(client for clients in per_method.values() for client in clients)
    if not names:
        return ""
    gains = {gain.client: gain.points for gain in client_gains(results, pool)}
    body = []
    for client in names:
        measured = [(clients.get(client) or {}) for clients in per_method.values()]
        count = next((plain(values["count"]) for values in measured if "count" in values), NOTHING)
        numbers = [percent(number(values.get("accuracy"))) for values in measured]
        more = [f"{gains[client]:+.1f}" if client in gains else NOTHING] if gains else []
        domain = [escape(who[client][1])] if _several_domains(who) else []
        body.append(row(chapter.client_head(client), count, *numbers, *more, *domain))
    titles = [method_label(results, name) for name in per_method]
    more = (["gain"] if gains else []) + (["domain"] if _several_domains(who) else [])
    caption = "Accuracy in % on each client's test data; gain: FedL2P minus the client's best baseline, in points."
    content = table(heads("Client", "samples", *titles, *more), body, caption, sortable=True)
    return f"<details><summary>{len(names)} {escape(pool)} clients</summary>\n{content}</details>\n"


def _several_domains(who: Mapping[str, tuple[str, str]]) -> bool:
    return len({domain for _, domain in who.values()}) > 1
