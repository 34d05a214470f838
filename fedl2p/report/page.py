"""`report.html`: one file that shows a run, without a network and without a script."""

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import RoundRecord
from fedl2p.io import write_atomically
from fedl2p.report.figures import History
from fedl2p.report.table import NOTHING, cells, method_label, number, pool_names

CAPTIONS = {
    "accuracy": "Accuracy of every method on the test data of seen and unseen clients.",
    "learning_curve": "Loss by round; the nets of the best round are the ones that were kept.",
    "beta": "Learned β: a box a batch-norm layer, over all clients, first layer on top.",
    "eta": "Learned η: a box a parameter tensor, over all clients, first layer on top.",
}

# The page may show its own pictures and style, and nothing can make it load or run anything else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --line: #d8dee4; --box: #f5f7f9;
  --mark: #0b6bab }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4af; --paper: #15181c; --line: #333a42;
  --box: #1e2329; --mark: #6cb8ee } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem } p { margin: .4rem 0 }
.soft, figcaption, caption { color: var(--soft) } caption, figcaption { font-size: .9rem; text-align: left }
caption { caption-side: bottom; padding-top: .5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th.text, td.text { text-align: left; white-space: normal }
td.best { font-weight: 700; color: var(--mark) } td small { color: var(--soft); font-weight: 400; display: block }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto; border-radius: 6px; background: #fff }
pre { background: var(--box); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem }
details { margin: .6rem 0 } summary { cursor: pointer }
"""


def write_page(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    history: History = (),
    figure_paths: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: the file, usually `<run>/report.html`.
        results: as in `results.json`; what is missing is left out, numbers may be None or NaN.
        history: the round records, for the failures; or their dictionaries.
        figure_paths: PNG files by name, of `save_figures`; they are put into the page.

    Raises:
        RunFolderError: a figure cannot be read, or the page cannot be written.
    """
    title = "FedL2P run"
    sections = [
        _head(title, results),
        _section("Methods", _methods(results)),
        _section("Differences", _comparisons(results)),
        _section("Learning rates", _rates(results)),
        _section("Figures", "".join(_figure(name, file) for name, file in (figure_paths or {}).items())),
        _section("Clients that failed", _failures(history)),
        _section("Clients", "".join(_clients(results, pool) for pool in pool_names(results))),
        _section("Timings", _pairs("Stage", "Time", _seconds(results))),
        _section("Versions", _pairs("Package", "Version", results.get("versions") or {})),
        _section("Configuration", _config(results.get("config"))),
    ]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{''.join(sections)}</body>\n</html>\n"
    )
    return write_atomically(path, page)


def _head(title: str, results: Mapping[str, Any]) -> str:
    rounds = results.get("rounds") or {}
    lines = [f"<h1>{title}</h1>\n"]
    facts = [f"seed {escape(str(results['seed']))}"] if "seed" in results else []
    if rounds:
        facts.append(f"{_plain(rounds.get('last'))} rounds, the best was {_plain(rounds.get('best'))}")
        first, best = number(rounds.get("first_val_loss")), number(rounds.get("best_val_loss"))
        facts.append(f"validation loss from {_fixed(first)} to {_fixed(best)}")
        facts.append(f"failed clients: {_plain(rounds.get('failures', 0))}")
    lines.append(f'<p class="soft">{"; ".join(facts)}</p>\n' if facts else "")
    return "".join(lines)


def _methods(results: Mapping[str, Any]) -> str:
    pools, measured = pool_names(results), cells(results)
    if not pools:
        return ""
    counts = {pool: max(row[pool].count for row in measured.values() if pool in row) for pool in pools}
    head = "".join(f"<th>{escape(pool)}, n = {counts[pool]}</th><th>loss</th>" for pool in pools)
    body = []
    for name, row in measured.items():
        single = {key: value for key, value in _settings(results, name).items() if not isinstance(value, list)}
        small = ", ".join(f"{escape(str(key).replace('_', ' '))} {_plain(value)}" for key, value in single.items())
        line = f"<td>{escape(method_label(results, name))}{f'<small>{small}</small>' if small else ''}</td>"
        for pool in pools:
            if pool not in row:
                line += f"<td>{NOTHING}</td><td>{NOTHING}</td>"
                continue
            best = ' class="best"' if row[pool].best else ""
            line += f"<td{best}>{row[pool].text}</td><td>{_fixed(row[pool].loss)}</td>"
        body.append(f"<tr>{line}</tr>\n")
    caption = (
        "Accuracy in %, mean ± SD over clients, after personalization on test data; the best in each column is bold."
    )
    return _table(f"<th>Method</th>{head}", body, caption)


def _settings(results: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    return (results["methods"][method] or {}).get("settings") or {}


def _rates(results: Mapping[str, Any]) -> str:
    """Which rates were tried for the methods that have one, and how they did."""
    body = []
    for name in results.get("methods") or {}:
        settings = _settings(results, name)
        tried = []
        for rate, loss in settings.get("grid") or ():
            text = f"{rate:.3g}: {_fixed(number(loss)) if math.isfinite(number(loss)) else 'diverges'}"
            tried.append(f"<b>{text}</b>" if rate == settings.get("rate") else text)
        if tried:
            body.append(
                f'<tr><td>{escape(method_label(results, name))}</td><td class="text">{", ".join(tried)}</td></tr>\n'
            )
    caption = "Each with the validation loss of the seen clients; the rate in bold is the one that was taken."
    return _table('<th>Method</th><th class="text">rates tried</th>', body, caption)


def _comparisons(results: Mapping[str, Any]) -> str:
    body = []
    for entry in results.get("comparisons") or ():
        mean, low, high = (100 * number(entry.get(key)) for key in ("mean", "low", "high"))
        interval = f"{low:+.1f} to {high:+.1f}" if math.isfinite(low) and math.isfinite(high) else NOTHING
        names = [escape(method_label(results, str(entry.get(key)))) for key in ("a", "b")]
        difference = f"{mean:+.1f}" if math.isfinite(mean) else NOTHING
        pool = escape(str(entry.get("pool")))
        body.append(
            f"<tr><td>{names[0]} minus {names[1]}</td><td>{pool}</td><td>{difference}</td><td>{interval}</td></tr>\n"
        )
    caption = (
        "Difference of accuracies in percentage points, client by client; 95 % bootstrap interval over the clients."
    )
    return _table("<th>Methods</th><th>pool</th><th>difference</th><th>interval</th>", body, caption)


def _clients(results: Mapping[str, Any], pool: str) -> str:
    per_method: dict[str, Mapping[str, Any]] = {}
    for name, entry in results["methods"].items():
        clients = ((entry or {}).get(pool) or {}).get("clients") or {}
        if clients:
            per_method[name] = clients
    names = dict.fromkeys(client for clients in per_method.values() for client in clients)
    if not names:
        return ""
    body = []
    for client in names:
        measured = [(clients.get(client) or {}) for clients in per_method.values()]
        count = next((_plain(values["count"]) for values in measured if "count" in values), NOTHING)
        numbers = "".join(f"<td>{_percent(number(values.get('accuracy')))}</td>" for values in measured)
        body.append(f"<tr><td>{escape(client)}</td><td>{count}</td>{numbers}</tr>\n")
    head = "".join(f"<th>{escape(method_label(results, name))}</th>" for name in per_method)
    table = _table(f"<th>Client</th><th>samples</th>{head}", body, "Accuracy in % on each client's test data.")
    return f"<details><summary>{len(names)} {escape(pool)} clients</summary>\n{table}</details>\n"


def _failures(history: History) -> str:
    body = []
    for entry in history:
        record: Mapping[str, Any] = entry.as_dict() if isinstance(entry, RoundRecord) else entry
        for client, reason in (record.get("failures") or {}).items():
            body.append(
                f'<tr><td>{_plain(record.get("round"))}</td><td class="text">{escape(str(client))}</td>'
                f'<td class="text">{escape(str(reason))}</td></tr>\n'
            )
    caption = "They were left out of their round's average."
    return _table('<th>Round</th><th class="text">client</th><th class="text">reason</th>', body, caption)


def _figure(name: str, file: str | os.PathLike[str]) -> str:
    try:
        data = base64.b64encode(Path(file).read_bytes()).decode()
    except OSError as error:
        raise RunFolderError(f"Cannot read the figure {file}: {error.strerror or error}.") from error
    caption = escape(CAPTIONS.get(name, name))
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">\n'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _config(config: Any) -> str:
    if not config:
        return ""
    text = config if isinstance(config, str) else OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    return f"<pre>{escape(text)}</pre>\n"


def _seconds(results: Mapping[str, Any]) -> dict[str, str]:
    return {stage: f"{number(value):,.1f} s" for stage, value in (results.get("timings") or {}).items()}


def _pairs(left: str, right: str, pairs: Mapping[str, Any]) -> str:
    rows = [f"<tr><td>{escape(str(key))}</td><td>{_plain(value)}</td></tr>\n" for key, value in pairs.items()]
    return _table(f"<th>{left}</th><th>{right}</th>", rows)


def _section(title: str, content: str) -> str:
    """Nothing where there is no content."""
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n" if content else ""


def _table(head: str, body: Sequence[str] | Iterable[str], caption: str = "") -> str:
    rows = "".join(body)
    if not rows:
        return ""
    note = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="wide"><table>{note}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'


def _plain(value: Any) -> str:
    return NOTHING if value is None else escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def _fixed(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else NOTHING


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else NOTHING
