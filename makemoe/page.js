// The page around the model. What a person types, points at and switches off becomes a task for the engine, and what
// the engine finds becomes text, colours and numbers.

"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
};
const facts = JSON.parse($("facts").textContent);
const { characters, config, moments, passage } = facts; // characters[i] is the token i
const { n_layer: L, num_experts: E } = config, ids = new Map(characters.map((c, i) => [c, i]));
const PACES = [2, 5, 10, 20, 50, 100, 200, 0]; // characters a second; 0: as fast as it can
const COUNT = 600; // characters that it writes
const LONGEST = 2000; // characters of a prompt; of a longer one the end is taken
const SHOWN = { "\n": "new line", " ": "space", "\t": "tab" };
const named = (token) => SHOWN[characters[token]] || characters[token];
const percent = (share) => `${share >= 0.095 ? Math.round(100 * share) : (100 * share).toFixed(1)} %`;
const hue = (e) => `hsl(${(e * 137.5) % 360} 60% calc(var(--light) + ${((e % 3) - 1) * 8}%))`;
const colour = (e) => (E <= 8 ? `var(--e${e})` : hue(e));

let start = []; // tokens that were given: typed, or chosen by hand
let text = []; // [{token, span, given, read, next}]: read holds [experts, gates] of each layer, next [[token, chance]]
let before = []; // the tokens of the run before this one
let comparable = false, differs = null; // does this text begin like that one, and where does it leave it?
let run = 0, writing = false, playing = false;
let cursor = null, pinned = false; // the place whose card is open, and whether it stays open
let pointed = null; // {layer, e} under the pointer on the switchboard
const off = Array.from({ length: L }, () => new Array(E).fill(false)); // silenced experts

// The engine ---------------------------------------------------------------------------------------------------------

function decode(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const letters = atob(base64), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i); // ten times as fast as Uint8Array.from
  return bytes;
}

// A function that hands a task to the engine: to a worker, or where there is none to the page itself.
const engine = (() => {
  const load = { kind: "load", config, moments, passage, bytes: decode($("weights").textContent.trim()) };
  let send, last = null;
  const here = () => {
    send = host(hear);
    send(load);
    if (last) send(last);
  };
  try {
    const worker = new Worker(URL.createObjectURL(new Blob([$("engine").textContent], { type: "text/javascript" })));
    worker.onmessage = (event) => hear(event.data);
    worker.onerror = here;
    worker.postMessage(load);
    send = (task) => worker.postMessage(task);
  } catch {
    here();
  }
  $("weights").remove();
  return (task) => send((last = task));
})();

function settings() {
  const numbers = { moment: "moment", temperature: "temperature", topK: "top-k", seed: "seed" };
  const values = Object.fromEntries(Object.entries(numbers).map(([name, id]) => [name, +$(id).value]));
  const who = { off: off.map((row) => [...row]), nextBest: $("next-best").checked, router: $("router").value };
  return { ...values, ...who, pace: PACES[+$("pace").value] };
}

// The typed prompt as tokens, in that of Unicode's forms that the model knows best.
function typed() {
  const value = $("prompt").value.slice(-2 * LONGEST), forms = [value, value.normalize("NFC"), value.normalize("NFD")];
  const strange = (form) => [...form].filter((c) => !ids.has(c));
  const best = forms.sort((a, b) => strange(a).length - strange(b).length)[0], left = [...new Set(strange(best))];
  const known = [...best].filter((c) => ids.has(c)).map((c) => ids.get(c));
  const some = left.slice(0, 8).map((c) => `“${c}”`).join(" ") + (left.length > 8 ? " …" : "");
  const cut = $("prompt").value.length > value.length || known.length > LONGEST;
  $("note").textContent = (left.length ? `The model does not know ${some}: left out. ` : "") +
    (cut ? `Only the last ${LONGEST} characters were taken. ` : "");
  return known.length ? known.slice(-LONGEST) : [ids.get("\n") ?? 0];
}

// Write on from `start`. What was read of the given tokens is kept where it still holds.
function write(kept = []) {
  const tokens = text.map((one) => one.token);
  const further = tokens.some((token, i) => token !== before[i]), written = text.filter((one) => !one.given).length;
  if (further && written >= 50) before = tokens; // a run that was ended at once is no measure
  comparable = before.length > start.length && start.every((token, i) => token === before[i]);
  differs = null;
  close();
  text = [];
  $("text").replaceChildren();
  start.forEach((token, i) => put(token, !kept[i] || kept[i].given, kept[i]));
  repaint();
  run += 1;
  busy(true);
  $("judge").classList.add("stale");
  engine({ kind: "write", run, ids: start, count: playing ? COUNT / 4 : COUNT, ...settings() });
}

function stop() {
  run += 1;
  busy(playing = false);
  engine({ kind: "judge", run, ...settings() });
}

function busy(now) {
  writing = now;
  $("write").textContent = now ? "Stop" : "Write";
  $("play").textContent = playing ? "Stop" : "Play it back";
}

function hear(message) {
  if (message.run !== run) return; // of a run that was ended
  if (message.kind === "written") written(message);
  else if (message.kind === "judged") judged(message);
  else if (message.kind === "end") ended(message);
  else $("note").textContent = `The engine failed: ${message.message}`;
}

function written({ tokens, read }) {
  const box = $("text"), atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60, first = text.length;
  tokens.forEach((token) => put(token, false));
  for (const [place, routings, next] of read) {
    if (text[place].read) continue; // it is read again in a shorter context
    Object.assign(text[place], { read: routings, next });
    paint(place);
    if (text[place + 1]) paint(place + 1);
  }
  compare(first);
  if (atEnd && cursor === null) box.scrollTop = box.scrollHeight;
  sharing ||= setTimeout(share, 150);
}

function ended({ perSecond }) {
  if (playing && +$("moment").value < moments.length - 1) {
    $("moment").value = +$("moment").value + 1;
    $("moment").oninput();
    return write();
  }
  busy(playing = false);
  if (!PACES[+$("pace").value]) $("note").append(` ${perSecond} characters a second.`);
  else if (comparable && differs === null) $("note").append(" The text is the same as before.");
}

// Mark the first character that is another one than in the text before.
function compare(first) {
  if (!comparable || differs !== null) return;
  for (let i = Math.max(first, start.length); i < Math.min(text.length, before.length); i++) {
    if (text[i].token !== before[i]) {
      differs = i;
      text[i].span.classList.add("differs");
      const now = named(text[i].token), then = named(before[i]);
      const equal = `${i - start.length} character${i === start.length + 1 ? "" : "s"}`;
      $("note").textContent = `The same for ${equal}, then “${now}” where “${then}” stood (blue mark).`;
      return;
    }
  }
}

// The text -----------------------------------------------------------------------------------------------------------

function put(token, given, { read = null, next = null } = {}) {
  const span = make("span", { textContent: characters[token], className: given ? "given" : "" });
  if (characters[token] === "\n") span.classList.add("line-end");
  span.dataset.place = text.length;
  text.push({ token, span, given, read, next });
  $("text").append(span);
}

// The place where the experts of a character are found: they predict it one place before they read it.
const asked = (place) => ($("side").value === "written" ? place - 1 : place);
const choice = (place, layer) => text[asked(place)]?.read?.[layer]; // [experts, gates], the heaviest first
const main = (place, layer) => choice(place, layer)?.[0][0] ?? null;

function paint(place) {
  const { span } = text[place], layer = +$("layer").value, e = main(place, layer);
  if (e === null) delete span.dataset.expert;
  else span.dataset.expert = e;
  span.style.backgroundColor = e === null ? "" : colour(e);
  span.classList.toggle("dim", pointed !== null && (e !== pointed.e || layer !== pointed.layer));
}

function repaint() {
  $("text").classList.toggle("numbers", $("numbers").checked);
  text.forEach((_, place) => paint(place));
}

// One character ------------------------------------------------------------------------------------------------------

function close() {
  if (cursor !== null) text[cursor]?.span.classList.remove("at");
  cursor = null;
  pinned = false;
  $("card").hidden = true;
  frame(null);
}

function open(place, pin) {
  close();
  if (!text[place]) return;
  [cursor, pinned] = [place, pin];
  const { token, span, given } = text[place], next = text[place - 1]?.next, card = $("card");
  const chance = next?.find(([i]) => i === token), side = $("side").value === "written" ? "predicted" : "read";
  const title = named(token) + (chance ? `, expected with ${percent(chance[1])}` : next ? ", less likely than these" : "");
  const rows = text[asked(place)]?.read ? text[asked(place)].read.map(([experts, gates], layer) => {
    const bar = make("span", { className: "bar" });
    experts.forEach((e, i) => {
      const part = make("b", { textContent: off[layer][e] ? `${e} off` : e });
      Object.assign(part.style, { width: `${100 * gates[i]}%`, background: off[layer][e] ? "var(--line)" : colour(e) });
      bar.append(part);
    });
    const numbers = gates.slice(0, 3).map((gate) => gate.toFixed(2)).join(" + ") || "none";
    return make("div", { className: "line" }, make("span", { textContent: `layer ${layer}` }), bar,
      make("span", { textContent: numbers }));
  }) : [];
  const found = rows.length ? `The experts that ${side} it, and their weights:` : `The model has not ${side} it in this run.`;
  const buttons = (next || []).map(([i, share]) => {
    const bar = make("i");
    bar.style.width = `${100 * share}%`;
    const button = make("button", { type: "button", className: i === token ? "chosen" : "" },
      make("code", { textContent: named(i) }), make("span", {}, bar), percent(share));
    button.onclick = () => goOn(place, i);
    return button;
  });
  if (next) buttons.unshift(make("p", { textContent: "The likeliest here. Choose one, and the text goes on from it:" }));
  const shut = make("button", { type: "button", className: "shut", textContent: "×", onclick: close });
  shut.setAttribute("aria-label", "Close");
  const head = make("p", {}, make("strong", { textContent: title }), given ? " (given)" : "", shut);
  card.replaceChildren(head, make("p", { textContent: found }), ...rows, ...buttons);
  card.classList.toggle("passing", !pin);
  card.hidden = false;
  span.classList.add("at");
  if (pin) span.scrollIntoView({ block: "nearest" });
  dock();
  frame(place);
  const spoken = rows.map((_, layer) => `Layer ${layer}: ${choice(place, layer)[0].join(" and ")}.`);
  if (pin) $("say").textContent = `${title}. ${found} ${spoken.join(" ")}`;
}

// Lay the card beside its character, inside the window.
function dock() {
  if (cursor === null) return;
  const box = text[cursor].span.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height, style } = $("card");
  const below = box.bottom + 8 + height <= innerHeight || box.top - 8 - height < 0;
  const top = below ? Math.min(box.bottom + 8, innerHeight - height - 4) : box.top - 8 - height;
  style.left = `${Math.max(0, Math.min(box.left - 40, innerWidth - width - 8))}px`;
  style.top = `${Math.max(0, top)}px`;
}

// Put another character into this place, and go on from it.
function goOn(place, token) {
  const kept = text.slice(0, place);
  start = [...kept.map((one) => one.token), token];
  text = []; // the text before is no measure any more
  before = [];
  $("note").textContent = `From here on it continues with “${named(token)}”, chosen by you.`;
  write(kept);
  $("text").focus();
}

// Frame the experts of one character on the switchboard.
function frame(place) {
  cells.forEach((row, layer) => row.forEach((cell, e) => {
    cell.classList.toggle("in", place !== null && Boolean(choice(place, layer)?.[0].includes(e)));
  }));
}

const placeOf = (event) => event.target.closest("span[data-place]")?.dataset.place;
$("text").onclick = (event) => (placeOf(event) === undefined ? close() : open(+placeOf(event), true));
$("text").onpointerover = (event) => {
  if (event.pointerType === "mouse" && !pinned && placeOf(event) !== undefined) open(+placeOf(event), false);
};
$("text").onpointerleave = () => { if (!pinned) close(); };
$("text").onscroll = onscroll = onresize = dock;
$("text").onkeydown = (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20, Home: -Infinity, End: Infinity }[event.key];
  if (step) {
    open(Math.max(0, Math.min(text.length - 1, cursor === null ? text.length - 1 : cursor + step)), true);
    event.preventDefault();
  } else if (event.key === "Enter" && cursor !== null) {
    $("card").querySelector("button")?.focus();
    event.preventDefault();
  }
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && cursor !== null) {
    close();
    $("text").focus();
  }
};

// The switchboard ----------------------------------------------------------------------------------------------------

const cells = off.map((row, layer) => row.map((_, e) => {
  const cell = make("button", { type: "button", className: "cell" }, make("i", { textContent: e }), make("b"));
  cell.style.setProperty("--c", colour(e));
  let pressed = 0; // who holds it down only looks
  cell.onpointerdown = () => { pressed = Date.now(); };
  cell.onclick = (event) => {
    if (event.detail && Date.now() - pressed > 500) return;
    off[layer][e] = !off[layer][e];
    changed();
  };
  cell.onpointerenter = cell.onfocus = () => point({ layer, e });
  cell.onpointerleave = cell.onblur = () => point(null);
  return cell;
}));
cells.forEach((row, layer) => {
  const whole = make("button", { type: "button", textContent: `layer ${layer}` });
  whole.setAttribute("aria-label", `silence all experts of layer ${layer}, or switch all on`);
  whole.onclick = () => {
    off[layer].fill(!off[layer].every(Boolean));
    changed();
  };
  $("board").append(make("div", { className: "board-row" }, whole, make("div", { className: "board-cells" }, ...row)));
});

// Let the characters of one expert stand out, and name those that it gets most.
function point(where) {
  pointed = where;
  if (where) $("layer").value = where.layer;
  repaint();
  if (!where) return share();
  const counts = new Map();
  text.forEach((one, place) => {
    if (main(place, where.layer) === where.e) counts.set(one.token, (counts.get(one.token) || 0) + 1);
  });
  const most = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8).map(([token]) => `“${named(token)}”`).join(" ");
  $("board-help").textContent = `Layer ${where.layer}, expert ${where.e}: ` +
    (most ? `first choice for ${most}.` : "first choice for no character of this text.");
}

// The share of each expert in the work of its layer, on the text.
let sharing = 0; // a timer: not more often than anybody can see
function share() {
  sharing = clearTimeout(sharing);
  const work = off.map((row) => row.map(() => 0));
  for (const { read } of text) read?.forEach(([experts], layer) => experts.forEach((e) => { work[layer][e] += 1; }));
  cells.forEach((row, layer) => {
    const all = work[layer].reduce((a, b) => a + b, 0) || 1, top = Math.max(...work[layer], 1);
    row.forEach((cell, e) => {
      const silent = off[layer][e], part = Math.round((100 * work[layer][e]) / all);
      cell.lastChild.textContent = silent ? "off" : part;
      cell.style.setProperty("--h", `${(90 * work[layer][e]) / top}%`);
      cell.setAttribute("aria-pressed", silent);
      const state = silent ? "silenced" : `${part} percent of the choices`;
      cell.setAttribute("aria-label", `layer ${layer}, expert ${e}: ${state}`);
    });
  });
  if (!pointed) {
    $("board-help").textContent = "Click an expert to silence it, and watch the text change. Point at it, or hold it down, " +
      `to see its characters. ${config.top_k} of ${E} work for each character; a number is a share of this work, in percent.`;
  }
}

function judged({ loss, plain }) {
  const guess = Math.log(characters.length), bar = (value, name) => {
    const part = make("i", { className: name });
    part.style.width = `${Math.min(100, (100 * value) / guess)}%`;
    return part;
  };
  const gap = loss - plain, more = `${Math.abs(gap).toFixed(3)} ${gap < 0 ? "less" : "more"} than the whole trained model`;
  $("judge").classList.remove("stale");
  $("judge").replaceChildren(make("strong", { textContent: `${loss.toFixed(3)} nats` }),
    `Loss on ${passage.length - 1} unseen characters`,
    make("div", { className: "meter" }, bar(Math.min(loss, plain)), bar(Math.max(gap, 0), "more")),
    `${Math.abs(gap) < 5e-7 ? "All experts on" : more}; a blind guess costs ${guess.toFixed(2)}.`);
}

// The controls -------------------------------------------------------------------------------------------------------

// Who works has changed: keys and values in the engine's cache would be stale, so it reads and writes again.
function changed() {
  playing = false;
  pointed = null;
  $("note").textContent = "";
  write();
  share();
}

function submit() {
  start = typed();
  playing = false;
  write();
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (writing) stop();
  else submit();
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
};
$("all").onclick = () => {
  off.forEach((row) => row.fill(false));
  $("router").value = "learned";
  $("next-best").checked = false;
  changed();
};
$("again").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
  changed();
};
$("play").onclick = () => {
  if (playing) return stop();
  $("moment").value = 0;
  $("moment").oninput();
  playing = true;
  write();
};
$("temperature").oninput = () => { $("temperature-is").textContent = (+$("temperature").value).toFixed(2); };
$("pace").oninput = () => { $("pace-is").textContent = PACES[+$("pace").value] || "all it can"; };
$("moment").oninput = () => { $("moment-is").textContent = moments[+$("moment").value].label; };
for (const id of ["next-best", "router", "temperature", "pace", "top-k", "seed", "moment"]) $(id).onchange = changed;
for (const id of ["layer", "side", "numbers"]) {
  $(id).onchange = () => {
    repaint();
    if (cursor !== null) open(cursor, pinned);
  };
}

off.forEach((_, layer) => $("layer").append(make("option", { value: layer, textContent: `layer ${layer}` })));
$("layer").value = L - 1;
for (const k of [0, 20, 10, 5, 3, 2, 1]) {
  const name = k === 0 ? `all ${characters.length} characters` : k === 1 ? "the likeliest" : `the ${k} likeliest`;
  if (k < characters.length) $("top-k").append(make("option", { value: k, textContent: name }));
}
$("moment").max = $("moment").value = moments.length - 1;
$("moments").hidden = moments.length < 2;
$("judge").hidden = passage.length < 2;
for (const id of ["temperature", "pace", "moment"]) $(id).oninput();
$("prompt").value = facts.prompt;
$("about").textContent = "A sparse mixture of experts continues your text, one character at a time, inside this page: nothing " +
  `is sent anywhere. It has ${facts.total.toLocaleString("en")} parameters; ${facts.active.toLocaleString("en")} of them ` +
  "work for any one character. Each colour is an expert, the one with the largest weight.";
share();
submit();
