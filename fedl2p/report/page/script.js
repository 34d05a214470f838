"use strict";
(() => {
  const { runs, clients } = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = ["--pink", "--green", "--orange", "--blue", "--sky", "--alarm"];
  const picked = [];
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  /** An element with properties and children; text is never read as HTML. */
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  // Sorting: every header of a sortable table becomes a button.

  const number = (cell) => {
    const found = cell.textContent.replaceAll(",", "").match(/^\s*[+-]?\d*\.?\d+(e[+-]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };

  function compare(a, b) {
    const [x, y] = [number(a), number(b)];
    if (!isNaN(x) && !isNaN(y)) return x - y;
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1; // what is no number comes last
    return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  }

  function sortBy(table, column) {
    const heads = all("thead th", table), body = table.tBodies[0];
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column]));
    body.append(...(down ? rows.reverse() : rows));
  }

  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, column) => {
      const button = make("button", { type: "button", textContent: head.textContent });
      button.addEventListener("click", () => sortBy(table, column));
      head.replaceChildren(button);
    });
  }

  // The name under the pointer.

  const tip = make("div", { className: "tip", hidden: true });
  document.body.append(tip);
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("use[data-client]");
    tip.hidden = !mark;
    if (!mark) return;
    const client = clients[mark.dataset.client];
    tip.textContent = `${client.name} (${client.domain}, ${client.pool}): ${mark.dataset.text}`;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - box.height - 12)}px`;
  });

  // A client's own part.

  const track = (...marks) => make("span", { className: "track" }, ...marks);
  const at = (tag, share, side = "left") => {
    const mark = make(tag);
    mark.style[side] = `${(100 * Math.max(0, Math.min(1, share || 0))).toFixed(1)}%`;
    return mark;
  };
  const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
  const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1));

  function rowsOf(title, heads, rows) {
    if (!rows.length) return [];
    const line = (tag, cells) => make("tr", {}, ...cells.map((cell, i) => {
      const inner = make(i && tag === "td" ? "td" : "th", {}, cell);
      inner.scope = tag === "th" ? "col" : "row";
      return inner;
    }));
    const table = make("table", {}, make("thead", {}, line("th", heads)), make("tbody", {}, ...rows.map((r) => line("td", r))));
    return [make("h4", {}, title), table];
  }

  function recipe(client, kind, title) {
    const layers = runs[client.run].layers[kind] || [];
    if (!client[kind]) return [];
    return rowsOf(title, ["layer", "value", "among all clients"], layers.map(([name, low, middle, high], i) => {
      const place = (value) => (high > low ? (value - low) / (high - low) : 0.5);
      const marks = client[kind][i] === null ? [] : [at("i", place(middle)), at("u", place(client[kind][i]))];
      return [name, short(client[kind][i]), track(...marks)];
    }));
  }

  function card(id) {
    const client = clients[id], run = runs[client.run];
    const close = make("button", { type: "button", textContent: `${client.name} ×`, title: "put back" });
    close.addEventListener("click", () => toggle(id));
    const where = [client.domain, client.pool, runs.length > 1 ? run.name : ""].filter(Boolean).join(", ");
    const details = Object.entries(client.details || {}).map(([key, value]) => `${key} ${short(value)}`);
    const sizes = client.sizes ? [`${client.sizes[0]} to train, ${client.sizes[1]} to validate, ${client.sizes[2]} to test`] : [];
    const most = Math.max(1, ...(client.labels || []));
    const labels = (client.labels || []).map((count, i) => [run.classes[i], String(count), count]).filter((row) => row[2]);
    return make("article", { className: "card", id: `client-${id}` },
      make("h3", {}, close), make("p", { className: "soft" }, where),
      make("p", {}, [...sizes, ...details].join("; ")),
      ...rowsOf("Accuracy (%)", ["method", "accuracy", "loss"], client.methods.map(([label, accuracy, loss]) => [label, percent(accuracy), short(loss)])),
      ...recipe(client, "beta", "β"), ...recipe(client, "eta", "η"),
      ...rowsOf("Labels, all roles", ["class", "samples", ""], labels.map(([name, text, count]) => [name, text, track(at("b", count / most, "width"))])));
  }

  function toggle(id) {
    const place = picked.indexOf(id);
    if (place < 0) picked.push(id);
    else picked.splice(place, 1);
    show();
  }

  function show() {
    all(".picked").forEach((mark) => mark.classList.remove("picked"));
    all("th[data-client] button").forEach((button) => button.setAttribute("aria-pressed", "false"));
    const cards = picked.map((id, i) => {
      const colour = `var(${COLOURS[i % COLOURS.length]})`;
      all(`[data-client="${id}"]`).forEach((mark) => {
        const target = mark.tagName === "TH" ? mark.parentElement : mark;
        target.classList.add("picked");
        target.style.setProperty("--pick", colour);
        if (mark.tagName === "TH") mark.firstChild.setAttribute("aria-pressed", "true");
      });
      const shown = card(id);
      shown.style.setProperty("--pick", colour);
      return shown;
    });
    document.getElementById("cards").replaceChildren(...cards);
    const bar = document.getElementById("bar");
    bar.hidden = !picked.length;
    bar.replaceChildren("Picked:", ...cards.map((shown, i) => {
      const link = make("a", { href: `#${shown.id}`, textContent: title(clients[picked[i]]) });
      link.style.setProperty("--pick", shown.style.getPropertyValue("--pick"));
      return link;
    }));
  }

  const panel = document.getElementById("picked");
  if (!panel) return;
  panel.hidden = false;
  const contents = document.querySelector("nav ul");
  if (contents) contents.append(make("li", {}, make("a", { href: "#picked", textContent: "Picked clients" })));
  const title = (client) => (runs.length > 1 ? `${client.name} (${runs[client.run].name})` : client.name);
  const byTitle = new Map(clients.map((client, id) => [title(client), id]));
  document.getElementById("client-names").append(...[...byTitle.keys()].map((value) => make("option", { value })));
  const input = document.getElementById("pick");
  input.addEventListener("input", () => {
    const id = byTitle.get(input.value);
    if (id === undefined) return;
    if (!picked.includes(id)) toggle(id);
    input.value = "";
  });
  document.getElementById("clear").addEventListener("click", () => { picked.length = 0; show(); });
  for (const head of all("th[data-client]")) {
    const button = make("button", { type: "button", textContent: head.textContent, ariaPressed: "false" });
    button.addEventListener("click", () => toggle(Number(head.dataset.client)));
    head.replaceChildren(button);
  }
  document.addEventListener("click", (event) => {
    const mark = event.target.closest("use[data-client]");
    if (mark) toggle(Number(mark.dataset.client));
  });
})();
