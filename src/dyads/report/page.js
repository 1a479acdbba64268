"use strict";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shown = (x) => (x === null || x === undefined ? "–" : Math.abs(x) >= 100 || Number.isInteger(x) ? x.toFixed(0) : Math.abs(x) >= 1 ? x.toFixed(2) : x.toPrecision(2));

// --- theme and tooltip

const redraws = [];
const redraw = () => redraws.forEach((draw) => draw());

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  redraw();
}

function showTip(text, x, y) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + box.height + 24 > innerHeight ? y - box.height - 12 : y + 16}px`;
}
const hideTip = () => ($("tip").hidden = true);

function tips() {
  const over = (event) => {
    const at = event.target.closest?.("[data-tip]");
    if (!at) return hideTip();
    const box = at.getBoundingClientRect();
    const keyboard = event.type === "focusin";
    showTip(at.dataset.tip, keyboard ? box.right : event.clientX, keyboard ? box.top : event.clientY);
  };
  document.addEventListener("mouseover", over);
  document.addEventListener("focusin", over);
  document.addEventListener("focusout", hideTip);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}

// --- order of the tasks

function order() {
  const list = $("strips");
  const by = $("order").value;
  const rows = [...list.querySelectorAll("li:not(.axis)")];
  rows.sort((a, b) => (by === "name" ? a.dataset.name.localeCompare(b.dataset.name) : b.dataset[by] - a.dataset[by]));
  list.append(...rows);
}

// --- instances

const PAGE = 20;

function options(select, items) {
  select.replaceChildren(...items.map(([value, text]) => element("option", { value }, text)));
}

function instances(data) {
  const form = $("filters");
  const field = form.elements;
  options(field.task, [["", "all tasks"], ...data.tasks.map((task, i) => [i, task.name])]);
  options(field.method, data.methods.map((method, i) => [i, method.shown]));
  options(field.against, [["", "–"], ...data.methods.map((method, i) => [i, method.shown])]);
  options(field.seed, data.seeds.map((seed) => [seed, seed]));
  $("seed-filter").hidden = data.seeds.length < 2;
  let limit = PAGE;

  const runOf = (method) => {
    const own = data.runs.map((run, i) => ({ ...run, i })).filter((run) => run.method === Number(method));
    return (own.find((run) => run.seed === field.seed.value) ?? own[0]).i;
  };
  const score = (run, task, i) => data.answers[run][task].scores[i];

  function matching() {
    const run = runOf(field.method.value);
    const other = field.against.value === "" ? null : runOf(field.against.value);
    const text = field.text.value.toLowerCase();
    const found = [];
    data.tasks.forEach((task, t) => {
      if (field.task.value !== "" && t !== Number(field.task.value)) return;
      task.instances.forEach((instance, i) => {
        const own = score(run, t, i);
        if (field.show.value === "wrong" && own >= 100) return;
        if (field.show.value === "right" && own < 100) return;
        if (other !== null && !(own > score(other, t, i))) return;
        const texts = [instance.prompt ?? "", data.answers[run][t].texts[i], ...instance.references];
        if (text && !texts.some((part) => part.toLowerCase().includes(text))) return;
        found.push([t, i, own]);
      });
    });
    return found;
  }

  function answersTable(t, i) {
    const body = element("tbody");
    data.methods.forEach((method, m) => {
      const run = runOf(m);
      const own = score(run, t, i);
      const value = element("td", { class: own >= 100 ? "score full" : "score" }, shown(own));
      const name = element("th", { scope: "row" }, element("span", { class: `key c${method.colour}` }), method.shown);
      body.append(element("tr", {}, name, element("td", {}, data.answers[run][t].texts[i] || "(empty)"), value));
    });
    const head = ["method", "answer", "score"].map((name) => element("th", { scope: "col" }, name));
    return element("div", { class: "wide" }, element("table", {}, element("thead", {}, element("tr", {}, ...head)), body));
  }

  function item([t, i, own]) {
    const task = data.tasks[t];
    const instance = task.instances[i];
    const answer = data.answers[runOf(field.method.value)][t].texts[i] || "(empty)";
    const value = element("span", { class: own >= 100 ? "score full" : "score" }, shown(own));
    const summary = element("summary", {}, value, element("span", {}, answer), element("small", {}, `${task.name} · ${instance.id}`));
    const details = element("details", {}, summary);
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector(".body")) return;
      const references = instance.references.map((text, n) => element("pre", { "aria-label": `reference ${n + 1}` }, text));
      const prompt = instance.prompt ?? "(the prompt was not kept by this evaluation; `dyads evaluate` again keeps it)";
      details.append(element("div", { class: "body" }, element("h4", {}, "Prompt"), element("pre", { tabindex: "0" }, prompt),
        element("h4", {}, references.length > 1 ? "References" : "Reference"), ...references, element("h4", {}, `Answers (${task.metric})`), answersTable(t, i)));
    });
    return element("li", {}, details);
  }

  function draw() {
    const found = matching();
    const mean = found.length ? found.reduce((sum, [, , own]) => sum + own, 0) / found.length : null;
    const name = data.methods[field.method.value].shown;
    $("found").textContent = `${found.length.toLocaleString("en")} instances, mean score of ${name} ${shown(mean)}`;
    $("list").replaceChildren(...found.slice(0, limit).map(item));
    $("more").hidden = found.length <= limit;
  }

  function fromAddress() {
    const [place, query] = location.hash.slice(1).split("?");
    if (place !== "instances" || query === undefined) return;
    const wanted = new URLSearchParams(query);
    form.reset();
    for (const name of ["task", "method", "show", "against", "seed"]) {
      const value = wanted.get(name);
      if (value !== null && [...field[name].options].some((option) => option.value === value)) field[name].value = value;
    }
    limit = PAGE;
    draw();
    $("instances").scrollIntoView();
    field.task.focus({ preventScroll: true });
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { limit = PAGE; draw(); });
  $("more").addEventListener("click", () => { limit += PAGE; draw(); });
  addEventListener("hashchange", fromAddress);
  const first = data.methods.findIndex((method) => !method.reference);
  if (first > 0) field.method.querySelector(`option[value="${first}"]`).setAttribute("selected", "");
  draw();
  fromAddress();
}

// --- curves

function curves(data) {
  const select = $("curve");
  options(select, data.curves.map((curve, i) => [i, curve.name]));
  const figure = $("curves");
  if (!data.curves.length) { figure.textContent = "No run logged its training."; return; }
  let at = null;

  function draw() {
    const curve = data.curves[select.value || 0];
    const width = Math.max(280, figure.clientWidth), height = Math.min(360, Math.max(220, width / 2.2));
    const left = 48, right = 12, top = 10, bottom = 30;
    const points = curve.series.flatMap((series) => series.points).filter(([, y]) => y !== null);
    if (!points.length) { figure.textContent = "No values were logged."; return; }
    const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
    const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (y1 - y0 < 1e-12) { y0 -= Math.abs(y0) / 2 || 1; y1 += Math.abs(y1) / 2 || 1; }
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const Y = (y) => top + ((y1 - y) / (y1 - y0)) * (height - top - bottom);
    const svg = element("svg:svg", { width, height, role: "img", "aria-label": curve.name });
    for (let k = 0; k <= 4; k++) {
      const y = y0 + (k / 4) * (y1 - y0), x = Math.round(x0 + (k / 4) * (x1 - x0));
      svg.append(element("svg:line", { class: "tick", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
      svg.append(element("svg:text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, shown(y)));
      svg.append(element("svg:text", { x: X(x), y: height - 10, "text-anchor": k === 4 ? "end" : "middle" }, k === 4 ? `step ${x}` : String(x)));
    }
    for (const series of curve.series) {
      const path = series.points.filter(([, y]) => y !== null).map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`);
      svg.append(element("svg:polyline", { class: `c${series.colour}`, fill: "none", stroke: "var(--c)", "stroke-width": 2, "stroke-opacity": series.faint ? 0.4 : 1, points: path.join(" ") }));
    }
    const steps = [...new Set(xs)].sort((a, b) => a - b);
    if (at !== null) {
      at = Math.max(0, Math.min(steps.length - 1, at));
      const step = steps[at];
      svg.append(element("svg:line", { x1: X(step), x2: X(step), y1: top, y2: height - bottom, stroke: "var(--soft)" }));
      const parts = curve.series.map((series) => [series.label, series.points.find(([x]) => x === step)?.[1]]);
      const text = parts.filter(([, y]) => y !== undefined).map(([label, y]) => `${label} ${shown(y)}`).join(" · ");
      $("curve-readout").textContent = `step ${step}: ${text}`;
    }
    svg.addEventListener("mousemove", (event) => {
      const x = x0 + ((event.clientX - svg.getBoundingClientRect().left - left) / (width - left - right)) * (x1 - x0);
      const near = steps.reduce((best, step, i) => (Math.abs(step - x) < Math.abs(steps[best] - x) ? i : best), 0);
      if (near !== at) { at = near; draw(); }
    });
    const labels = new Map(curve.series.map((series) => [series.label.replace(/, seed .*$/, ""), series.colour]));
    const legend = [...labels].map(([label, c]) => element("span", {}, element("span", { class: `key c${c}` }), label));
    figure.replaceChildren(element("p", { class: "legend" }, ...legend), svg);
  }

  figure.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    at = at === null ? 0 : at + (event.key === "ArrowRight" ? 1 : -1);
    draw();
  });
  select.addEventListener("input", () => { at = null; $("curve-readout").textContent = ""; draw(); });
  redraws.push(draw);
  draw();
}

// --- what was learned

function rgb(name) {
  const hex = colour(name).replace("#", "");
  const full = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
  return [0, 2, 4].map((i) => parseInt(full.slice(i, i + 2), 16));
}

function heatMap() {
  const canvas = $("map");
  let map = null, at = null, place = null;

  function draw() {
    if (!map) return;
    const rows = map.rows.length, columns = map.columns.length, narrow = innerWidth < 640;
    const gutter = narrow ? 84 : 170, room = canvas.parentElement.clientWidth - gutter - 4;
    const cell = Math.max(4, Math.min(28, Math.floor(room / columns))), high = rows > 40 ? 10 : 18;
    const width = gutter + cell * columns + 2, height = high * rows + 22, ratio = devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.clearRect(0, 0, width, height);
    const low = rgb("--low"), top = rgb("--accent");
    c.font = `${Math.min(12, high - 2)}px system-ui, sans-serif`;
    c.textBaseline = "middle";
    for (let i = 0; i < rows; i++) {
      c.fillStyle = colour("--ink");
      c.textAlign = "right";
      let name = map.rows[i];
      while (name.length > 4 && c.measureText(name).width > gutter - 10) name = `${name.slice(0, -2)}…`.replace("……", "…");
      c.fillText(name, gutter - 6, i * high + high / 2);
      for (let j = 0; j < columns; j++) {
        const value = map.values[i][j];
        if (value === null) continue;
        const part = map.high > map.low ? (value - map.low) / (map.high - map.low) : 0;
        c.fillStyle = `rgb(${low.map((from, k) => Math.round(from + part * (top[k] - from))).join(" ")})`;
        c.fillRect(gutter + j * cell, i * high, cell - (cell > 8 ? 1 : 0), high - 1);
      }
    }
    c.fillStyle = colour("--soft");
    c.textAlign = "left";
    c.fillText(`${map.column} →   ${shown(map.low)} (pale) to ${shown(map.high)}`, gutter, height - 9);
    if (at) {
      c.strokeStyle = colour("--ink"); c.lineWidth = 2;
      c.strokeRect(gutter + at[1] * cell, at[0] * high, cell, high);
      const value = map.values[at[0]][at[1]];
      $("map-readout").textContent = `${map.row} ${map.rows[at[0]]}, ${map.column} ${map.columns[at[1]]}: ${shown(value)}`;
    }
    place = { gutter, cell, high, rows, columns };
  }

  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const i = Math.floor((event.clientY - box.top) / place.high), j = Math.floor((event.clientX - box.left - place.gutter) / place.cell);
    if (i < 0 || j < 0 || i >= place.rows || j >= place.columns) return hideTip();
    at = [i, j];
    draw();
    showTip($("map-readout").textContent, event.clientX, event.clientY);
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move || !map) return;
    event.preventDefault();
    const [i, j] = at ?? [0, 0];
    at = at ? [Math.max(0, Math.min(place.rows - 1, i + move[0])), Math.max(0, Math.min(place.columns - 1, j + move[1]))] : [0, 0];
    draw();
  });
  redraws.push(draw);
  return (next) => {
    map = next; at = null;
    $("map-about").textContent = map.about;
    $("map-readout").textContent = "";
    canvas.setAttribute("aria-label", `${map.title}: ${map.about} Arrow keys move the cursor.`);
    draw();
  };
}

function taskMap(entry) {
  const figure = $("taskmap"), tree = $("dendrogram");
  figure.replaceChildren(); tree.replaceChildren();
  $("taskmap-part").hidden = !entry;
  if (!entry) return;
  const width = Math.min(720, Math.max(280, figure.clientWidth)), height = Math.round(width * 0.6), edge = 90;
  const svg = element("svg:svg", { width, height, role: "img", "aria-label": "Map of the tasks" });
  entry.tasks.forEach((task, i) => {
    const x = edge + entry.x[i] * (width - 2 * edge), y = 20 + entry.y[i] * (height - 40);
    const near = entry.near[i];
    svg.append(element("svg:circle", { class: "dot c1", cx: x, cy: y, r: 5, tabindex: "0", "data-tip": `${task}\nmost similar: ${near[0]}, cosine ${shown(near[1])}` }));
    const name = task.length > 24 ? `${task.slice(0, 22)}…` : task;
    svg.append(element("svg:text", { x, y: y - 9, "text-anchor": "middle" }, name));
  });
  figure.append(svg);

  const row = 20, n = entry.tasks.length, gutter = Math.min(220, width / 2), span = width - gutter - 20;
  const most = Math.max(...entry.merges.map((merge) => merge[2]), 1e-9);
  const drawn = element("svg:svg", { width, height: n * row + 24, role: "img", "aria-label": "Dendrogram of the tasks" });
  const nodes = new Map();
  entry.order.forEach((task, i) => {
    nodes.set(task, [0, i * row + row / 2]);
    const name = entry.tasks[task];
    drawn.append(element("svg:text", { x: gutter - 6, y: i * row + row / 2 + 4, "text-anchor": "end" }, name.length > 32 ? `${name.slice(0, 30)}…` : name));
  });
  entry.merges.forEach(([a, b, distance], i) => {
    const [xa, ya] = nodes.get(a), [xb, yb] = nodes.get(b), x = (distance / most) * span;
    const points = [[xa, ya], [x, ya], [x, yb], [xb, yb]].map(([px, py]) => `${(gutter + px).toFixed(1)},${py}`).join(" ");
    drawn.append(element("svg:polyline", { points, fill: "none", stroke: "var(--c1)", "stroke-width": 1.5, "data-tip": `1 - cosine ${shown(distance)}` }));
    nodes.set(n + i, [x, (ya + yb) / 2]);
  });
  drawn.append(element("svg:text", { x: gutter, y: n * row + 16 }, "0"), element("svg:text", { x: gutter + span, y: n * row + 16, "text-anchor": "end" }, `1 - cosine ${shown(most)}`));
  tree.append(drawn);
}

function tokens(entry) {
  $("token-part").hidden = !entry;
  if (!entry) return;
  const select = $("token-instance"), slider = $("token-layer");
  options(select, entry.instances.map((instance, i) => [i, instance.title]));
  slider.max = entry.layers.length - 1;
  slider.value = 0;
  const legend = Array.from({ length: Math.min(entry.experts, 32) }, (_, e) => element("span", {}, element("span", { class: `key c${e % 8}` }), `expert ${e}`));
  $("token-legend").replaceChildren(...legend);
  const draw = () => {
    const instance = entry.instances[select.value], layer = Number(slider.value);
    $("token-layer-name").textContent = entry.layers[layer];
    $("tokens").replaceChildren(...instance.texts.map((text, i) => {
      const expert = instance.expert[layer][i];
      return element("span", { class: `c${expert % 8}`, "data-expert": expert, "data-tip": `expert ${expert}, ${shown(instance.weight[layer][i])} % of the weight` }, text);
    }));
  };
  select.oninput = draw;
  slider.oninput = draw;
  draw();
}

function learned(data) {
  if (!data.learned.length) return;
  const method = $("learned-method"), which = $("learned-map"), by = $("taskmap-by");
  const show = heatMap();
  const chosen = () => data.learned[method.value];
  const drawMap = () => show(chosen().maps[which.value]);
  const drawTasks = () => taskMap(chosen().taskmaps[by.value]);
  const fill = () => {
    options(which, chosen().maps.map((map, i) => [i, map.title]));
    options(by, chosen().taskmaps.map((entry, i) => [i, entry.by]));
    drawMap();
    drawTasks();
    tokens(chosen().tokens);
  };
  method.addEventListener("input", fill);
  which.addEventListener("input", drawMap);
  by.addEventListener("input", drawTasks);
  redraws.push(drawTasks);
  method.value = Math.max(0, data.learned.findIndex((entry) => entry.taskmaps.length));
  fill();
}

// --- start

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function start() {
  $("theme").addEventListener("click", toggleTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", redraw);
  tips();
  $("order").addEventListener("input", order);
  const data = await unpack($("data").textContent);
  instances(data);
  curves(data);
  learned(data);
  document.documentElement.dataset.ready = "yes";
}
start();
