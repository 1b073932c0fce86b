// The model of makemoe in plain JavaScript. What a PyTorch module does with a batch of texts is done here for one token
// at a time. Arrays are Float32Arrays, a matrix is row after row. It runs in a web worker, in a page, and in Node.

"use strict";

// Arithmetic ---------------------------------------------------------------------------------------------------------

// nn.Linear of one vector x: W x + bias. The matrix has `rows` rows and begins at `from`.
function linear(W, x, rows, bias, from = 0) {
  const columns = x.length, y = new Float32Array(rows);
  let r = 0, w = from;
  for (; r + 3 < rows; r += 4, w += 4 * columns) { // four rows at once: a processor can overlap their sums
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < columns; i++) {
      a += W[w + i] * x[i];
      b += W[w + columns + i] * x[i];
      c += W[w + 2 * columns + i] * x[i];
      d += W[w + 3 * columns + i] * x[i];
    }
    [y[r], y[r + 1], y[r + 2], y[r + 3]] = [a, b, c, d];
  }
  for (; r < rows; r++, w += columns) {
    let a = 0;
    for (let i = 0; i < columns; i++) a += W[w + i] * x[i];
    y[r] = a;
  }
  if (bias) add(y, bias);
  return y;
}

// x += scale * y
function add(x, y, scale = 1) {
  for (let i = 0; i < x.length; i++) x[i] += scale * y[i];
}

// nn.LayerNorm where there is a bias, else nn.RMSNorm; each with PyTorch's eps.
function norm(x, weight, bias) {
  const n = x.length, y = new Float32Array(n);
  let mean = 0, square = 0;
  if (bias) for (let i = 0; i < n; i++) mean += x[i] / n;
  for (let i = 0; i < n; i++) square += (x[i] - mean) ** 2 / n;
  const scale = 1 / Math.sqrt(square + (bias ? 1e-5 : 1.1920929e-7));
  for (let i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
  return y;
}

function softmax(values) {
  const probs = new Float64Array(values.length);
  let top = -Infinity, sum = 0;
  for (let i = 0; i < values.length; i++) top = Math.max(top, values[i]);
  for (let i = 0; i < values.length; i++) sum += probs[i] = Math.exp(values[i] - top);
  for (let i = 0; i < values.length; i++) probs[i] /= sum;
  return probs;
}

// The error function, to 1.2e-7 everywhere (Press et al., Numerical Recipes, section 6.2).
const ERF = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
  -0.82215223, 0.17087277];
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x)), y = 1 - t * Math.exp(ERF.reduceRight((sum, c) => sum * t + c, 0) - x * x);
  return x < 0 ? -y : y;
}

const ACTIVATIONS = {
  relu: (x) => (x > 0 ? x : 0),
  squared_relu: (x) => (x > 0 ? x * x : 0),
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
};

// Places of the `k` largest values, the largest first; of equals the first.
function largest(values, k) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b).slice(0, k);
}

// Random numbers from 0 to 1, the same for the same seed in every browser (mulberry32).
function dice(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// The model ----------------------------------------------------------------------------------------------------------

class Model {
  // `changes`: off[layer][e] silences an expert; nextBest lets the next best one replace it; router is "learned",
  // "random" (weights from chance, never trained) or "hash" (the token alone decides).
  constructor(config, weights, changes = {}) {
    const { n_layer: L, n_embd: C, n_head: H, block_size: T } = config;
    Object.assign(this, { config, weights, off: null, nextBest: false, router: "learned", position: 0 }, changes);
    this.caches = Array.from({ length: L }, () => ({ keys: new Float32Array(T * C), values: new Float32Array(T * C) }));
    this.speeds = Array.from({ length: C / H / 2 }, (_, i) => 10000 ** ((-2 * i * H) / C));
    this.frozen = [];
  }

  // SparseMoELanguageModel.forward of the next token: the logits of the one after it, and the choice in each layer.
  read(token) {
    const { n_embd: C, n_layer: L, vocab_size: V, routed_scaling_factor: factor } = this.config, w = this.weights;
    const x = w["token_embedding.weight"].slice(token * C, token * C + C), routings = [];
    const learned = w["position_embedding.weight"];
    if (learned) add(x, learned.subarray(this.position * C, this.position * C + C));
    for (let layer = 0; layer < L; layer++) {
      const get = (name) => w[`blocks.${layer}.${name}`];
      add(x, this.attention(norm(x, get("norm1.weight"), get("norm1.bias")), this.caches[layer], get));
      const input = norm(x, get("norm2.weight"), get("norm2.bias"));
      const routing = this.route(input, layer, token, get);
      add(x, this.experts(input, routing, this.off && this.off[layer], get), factor);
      routings.push(routing);
    }
    this.position++;
    const last = norm(x, w["norm.weight"], w["norm.bias"]);
    return { logits: linear(w["lm_head.weight"], last, V, w["lm_head.bias"]), routings };
  }

  // MultiHeadAttention of the newest token; keys and values of those before it are in the cache.
  attention(input, cache, get) {
    const { n_embd: C, n_head: H, positions } = this.config, D = C / H, now = this.position;
    const qkv = linear(get("attention.qkv.weight"), input, 3 * C);
    const y = new Float32Array(C), scores = new Float32Array(now + 1);
    if (positions === "rotary") for (let h = 0; h < 2 * H; h++) this.rotate(qkv, h * D, D, now); // queries, then keys
    cache.keys.set(qkv.subarray(C, 2 * C), now * C);
    cache.values.set(qkv.subarray(2 * C), now * C);
    for (let h = 0; h < H; h++) {
      for (let t = 0; t <= now; t++) {
        let sum = 0;
        for (let d = h * D; d < h * D + D; d++) sum += qkv[d] * cache.keys[t * C + d];
        scores[t] = sum / Math.sqrt(D);
      }
      const weights = softmax(scores);
      for (let t = 0; t <= now; t++) {
        for (let d = h * D; d < h * D + D; d++) y[d] += weights[t] * cache.values[t * C + d];
      }
    }
    return linear(get("attention.proj.weight"), y, C, get("attention.proj.bias"));
  }

  // rotate: the D channels from `from` on, in pairs (i, i + D/2), turn by angles that grow with the position.
  rotate(x, from, D, position) {
    for (let i = from; i < from + D / 2; i++) {
      const angle = position * this.speeds[i - from], cos = Math.cos(angle), sin = Math.sin(angle);
      const a = x[i], b = x[i + D / 2];
      x[i] = a * cos - b * sin;
      x[i + D / 2] = a * sin + b * cos;
    }
  }

  // TopkRouter: score the experts, choose the best, and share one unit of weight among them.
  route(input, layer, token, get) {
    const { num_experts: E, n_embd: C, top_k: k } = this.config;
    let scores;
    if (this.router === "learned") scores = linear(get("router.weight"), input, E, get("router.bias"));
    else if (this.router === "random") {
      const chance = dice(layer + 1);
      this.frozen[layer] ||= Float32Array.from({ length: E * C }, () => chance() - 0.5);
      scores = linear(this.frozen[layer], input, E);
    } else {
      const chance = dice(1009 * token + layer);
      scores = Float32Array.from({ length: E }, chance);
    }
    if (this.nextBest && this.off) for (let e = 0; e < E; e++) if (this.off[layer][e]) scores[e] = -Infinity;
    const experts = largest(scores, k).filter((e) => scores[e] > -Infinity);
    return { experts, gates: softmax(experts.map((e) => scores[e])) };
  }

  // Experts: the answers of those that were chosen, weighted by their gates. One that is off adds nothing.
  experts(input, { experts, gates }, off, get) {
    const { n_embd: C, n_hidden: F, activation } = this.config, act = ACTIVATIONS[activation];
    const up = get("experts.up"), upBias = get("experts.up_bias");
    const down = get("experts.down"), downBias = get("experts.down_bias"), y = new Float32Array(C);
    experts.forEach((e, i) => {
      if (off && off[e]) return;
      const hidden = linear(up, input, F, upBias && upBias.subarray(e * F, e * F + F), e * F * C);
      for (let f = 0, w = e * F * C; f < F; f++, w += C) {
        const value = gates[i] * act(hidden[f]);
        if (value !== 0) for (let c = 0; c < C; c++) y[c] += value * down[w + c]; // most hidden units of a ReLU are 0
      }
      if (downBias) add(y, downBias.subarray(e * C, e * C + C), gates[i]);
    });
    return y;
  }
}

// Writing ------------------------------------------------------------------------------------------------------------

// next_token_probs
function nextProbs(logits, temperature = 1, topK = 0) {
  const best = largest(logits, temperature === 0 ? 1 : topK || logits.length), probs = new Float64Array(logits.length);
  const shares = softmax(best.map((i) => (logits[i] - logits[best[0]]) / (temperature || 1)));
  best.forEach((i, rank) => { probs[i] = shares[rank]; });
  return probs;
}

// The token on which `uniform`, a number from 0 to 1, falls when the probabilities lie side by side.
function draw(probs, uniform) {
  let sum = 0, last = 0;
  for (let i = 0; i < probs.length; i++) {
    if (probs[i] > 0) last = i;
    sum += probs[i];
    if (uniform < sum) break;
  }
  return last;
}

// stream, one step after another: read what is new, or the newer half of the context again when it is full.
class Writer {
  constructor(model, ids) {
    this.model = model;
    this.window = this.unread = ids.slice(-model.config.block_size);
  }

  // What the model says about each unread token, [{logits, routings}].
  read() {
    const size = this.model.config.block_size;
    if (this.window.length > size) {
      this.window = this.unread = this.window.slice(-((size + 1) >> 1));
      this.model.position = 0;
    }
    return this.unread.map((token) => this.model.read(token));
  }

  add(token) {
    this.window = [...this.window, token];
    this.unread = [token];
  }
}

// F.cross_entropy of each token of `ids` after the first, in nats, one context after another.
function* losses(model, ids) {
  const size = model.config.block_size;
  for (let t = 0; t + 1 < ids.length; t++) {
    if (t % size === 0) model.position = 0;
    yield -Math.log(softmax(model.read(ids[t]).logits)[ids[t + 1]]);
  }
}

// Weights ------------------------------------------------------------------------------------------------------------

// The number that 16 bits mean: sign, exponent, fraction.
function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
}

// {name: Float32Array} of the bytes that page.py packed. An int8 matrix is followed by the scale of each row.
function unpack(tensors, bytes) {
  const weights = {};
  let halves = null; // a table of all 65,536 is faster than working each number out
  for (const { name, shape, type, at } of tensors) {
    const count = shape.reduce((a, b) => a * b), columns = shape[shape.length - 1], values = new Float32Array(count);
    if (type === "float32") values.set(new Float32Array(bytes.buffer, at, count));
    else if (type === "float16") {
      halves ||= Float32Array.from({ length: 65536 }, (_, i) => half(i));
      new Uint16Array(bytes.buffer, at, count).forEach((bits, i) => { values[i] = halves[bits]; });
    } else {
      const numbers = new Int8Array(bytes.buffer, at, count);
      const scales = new Float32Array(bytes.buffer, at + count + (-count & 3), count / columns);
      for (let i = 0; i < count; i++) values[i] = numbers[i] * scales[Math.floor(i / columns)];
    }
    weights[name] = values;
  }
  return weights;
}

// The host -----------------------------------------------------------------------------------------------------------

// Takes tasks and sends what it finds. Work is cut into slices of 30 ms. A new task ends the one before: whatever is
// sent carries the number of its run, so that the page can tell late messages.
function host(send) {
  let loaded, newest = 0;
  const weights = [], known = new Map();
  const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

  function build({ moment, off, nextBest, router }) {
    weights[moment] ||= unpack(loaded.moments[moment].tensors, loaded.bytes);
    return new Model(loaded.config, weights[moment], { off, nextBest, router });
  }

  async function write({ run, ids, count, temperature, topK, seed, pace, ...changes }) {
    const model = build(changes), writer = new Writer(model, ids), roll = dice(seed), begin = Date.now();
    let read = [], tokens = [], last = begin;
    for (let written = 0; written <= count; written++) {
      const said = writer.read(), first = ids.length + written - said.length;
      said.forEach(({ logits, routings }, i) => {
        const probs = softmax(logits), next = largest(probs, 6).map((token) => [token, probs[token]]);
        read.push([first + i, routings.map(({ experts, gates }) => [experts, [...gates]]), next]);
      });
      if (written < count) {
        tokens.push(draw(nextProbs(said[said.length - 1].logits, temperature, topK), roll()));
        writer.add(tokens[tokens.length - 1]);
      }
      const early = pace ? begin + (1000 * (written + 1)) / pace - Date.now() : 0;
      if (early > 0 || Date.now() - last > 30 || written === count) {
        send({ run, kind: "written", read, tokens });
        read = [];
        tokens = [];
        await pause(Math.max(early, 0));
        last = Date.now();
        if (run !== newest) return;
      }
    }
    send({ run, kind: "end", perSecond: Math.round((1000 * count) / (Date.now() - begin)) });
  }

  // The mean loss on the passage, or null if a newer task has come; what was computed once is kept.
  async function loss(run, changes) {
    const key = JSON.stringify(changes), { passage } = loaded;
    if (!known.has(key)) {
      let sum = 0, last = Date.now();
      for (const one of losses(build(changes), passage)) {
        sum += one;
        if (Date.now() - last > 30) {
          await pause(0);
          last = Date.now();
          if (run !== newest) return null;
        }
      }
      known.set(key, sum / (passage.length - 1));
    }
    return known.get(key);
  }

  async function judge({ run, moment, off, nextBest, router }) {
    if (loaded.passage.length < 2) return;
    const none = off.map((row) => row.map(() => false)), end = loaded.moments.length - 1;
    const plain = await loss(run, { moment: end, off: none, nextBest: false, router: "learned" });
    if (plain === null) return;
    const now = await loss(run, { moment, off, nextBest: nextBest && off.flat().some(Boolean), router });
    if (now !== null) send({ run, kind: "judged", loss: now, plain });
  }

  return async (task) => {
    if (task.kind === "load") loaded = task;
    else {
      newest = task.run;
      try {
        await Promise.all(task.kind === "write" ? [write(task), judge(task)] : [judge(task)]);
      } catch (error) {
        send({ run: task.run, kind: "failed", message: String(error) });
      }
    }
  };
}

if (typeof WorkerGlobalScope !== "undefined") {
  const work = host((message) => self.postMessage(message));
  self.onmessage = (event) => work(event.data);
}
if (typeof module !== "undefined") {
  module.exports = { linear, norm, softmax, erf, largest, dice, Model, nextProbs, draw, Writer, losses, unpack, host };
}
