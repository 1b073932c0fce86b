"""The page: its engine computes what PyTorch computes, in Node; and in a real browser a person can use it.

Node runs engine.js alone, many models in one process. The browser is Debian's chromium with chromium-driver, led by
selenium. Where one of them is missing, its tests are skipped, with the reason in one line.
"""

import ast
import base64
import json
import math
import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import makemoe
from classroom.lessons import ROOT, read_cells
from makemoe.checkpoints import load_checkpoint, save_checkpoint
from makemoe.checks import refuses
from makemoe.checks import page as checks
from makemoe.data import CharTokenizer
from makemoe.gating import top_k_gating
from makemoe.generation import next_token_probs, stream
from makemoe.model import MoEConfig, SparseMoELanguageModel
from makemoe.page import find_passage, make_page, pack, page_tensors, quantize, write_page
from makemoe.training import estimate_loss

FOLDER = Path(makemoe.__path__[0])
ENGINE = FOLDER / "engine.js"


def test_quantize_satisfies_its_check():
    from classroom.hidden import page as hidden

    checks.check_quantize(quantize)
    hidden.check_quantize(quantize)


# The engine in Node --------------------------------------------------------------------------------------------------

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="there is no Node here")
PROLOGUE = f"""
const engine = require({json.dumps(str(ENGINE))});
const facts = JSON.parse(require("fs").readFileSync(0, "utf8"));
Object.assign(globalThis, engine);
const build = ({{ config, tensors, bytes }}, changes) =>
  new Model(config, unpack(tensors, new Uint8Array(Buffer.from(bytes, "base64"))), changes);
const answer = (value) => console.log(JSON.stringify(value, (_, v) => (ArrayBuffer.isView(v) ? [...v] : v)));
"""


def in_node(program, facts):
    "What `program` answers, a JavaScript that calls `answer(value)` and finds `facts`."
    done = subprocess.run(
        ["node", "-e", PROLOGUE + program], input=json.dumps(facts), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def handed(model, weights="float32"):
    tensors, packed = pack(page_tensors(model), weights)
    return dict(config=asdict(model.config), tensors=tensors, bytes=base64.b64encode(packed).decode())


def strong(model):
    "The model with weights so large that every part of it matters."
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if "embedding" in name else 0.25 if weight.dim() > 1 else 0.2
            weight.add_(scale * torch.randn(weight.shape))
    return model.eval()


SIZES = dict(vocab_size=13, block_size=12, n_embd=16, n_head=2, n_layer=2, num_experts=5, top_k=2, n_hidden=11)
CONFIGS = [
    {},
    dict(top_k=1),
    dict(top_k=5),
    dict(positions="learned"),
    dict(norm="layer"),
    dict(activation="gelu"),
    dict(activation="relu", bias=True),
    dict(bias=True, experts="loop", norm="layer"),
    dict(router="noisy", routed_scaling_factor=2.0, dropout=0.3),
    dict(n_layer=1, n_head=1, num_experts=1, top_k=1, vocab_size=1, block_size=1),
    dict(n_embd=18, n_head=3, n_hidden=7, num_experts=9, block_size=5),
]


@pytest.fixture(scope="module")
def lab():
    model, tokenizer, _ = load_checkpoint(ROOT / "data" / "lab.safetensors")
    return model, tokenizer, find_passage(tokenizer)


@needs_node
def test_the_logits_are_those_of_pytorch(lab):
    model, tokenizer, passage = lab
    models = [model] + [strong(SparseMoELanguageModel(MoEConfig(**SIZES | changes))) for changes in CONFIGS]
    facts, wanted = [], []
    for model in models:
        T, V = model.config.block_size, model.config.vocab_size
        ids = torch.randint(V, (T,)) if V < 60 else tokenizer.encode(passage)[:T].long()
        with torch.no_grad():
            output = model(ids[None])
        facts.append(dict(handed(model), ids=ids.tolist()))
        wanted.append((output.logits[0], [routing.chosen[0] for routing in output.routings]))
    program = "answer(facts.map((one) => { const model = build(one); return one.ids.map((id) => model.read(id)); }));"
    for changes, said, (logits, chosen) in zip(["lab", *CONFIGS], in_node(program, facts), wanted):
        theirs = torch.tensor([one["logits"] for one in said])
        assert (theirs - logits).abs().max() < 1e-4, changes
        for layer, choice in enumerate(chosen):
            for t, one in enumerate(said):
                assert set(one["routings"][layer]["experts"]) == set(choice[t].nonzero().flatten().tolist()), changes


@needs_node
def test_int8_and_float16_are_what_pytorch_makes_of_them():
    model = strong(SparseMoELanguageModel(MoEConfig(**SIZES)))
    for name, weight in page_tensors(model).items():  # very small numbers are kept differently by float16
        if name.endswith("up"):
            weight[0] *= 1e-6
    for kind in "int8", "float16":
        tensors = page_tensors(model)
        program = "const one = facts; answer(build(one).weights);"
        said = in_node(program, handed(model, kind))
        for name, weight in tensors.items():
            numbers, scale = quantize(weight)
            wanted = weight if weight.dim() == 1 else numbers * scale if kind == "int8" else weight.half().float()
            assert torch.equal(torch.tensor(said[name]).view_as(weight), wanted), (kind, name)


def draw(probs, uniform):
    "Inverse of the cumulative sum, one row."
    passed = (probs.double().cumsum(dim=-1) <= uniform).sum().item()
    return min(passed, probs.nonzero().max().item())


@needs_node
def test_the_text_is_that_of_generate_for_the_same_uniform_numbers(lab, monkeypatch):
    model, tokenizer, passage = lab
    jobs = []
    for prompt, temperature, top_k in (passage[:100], 0.8, None), ("Romeo:\n", 1.0, 5), ("\n", 0, None):
        numbers = torch.rand(150, dtype=torch.float64)
        waiting = iter(numbers.tolist())
        monkeypatch.setattr(
            torch, "multinomial", lambda probs, n, generator=None: torch.tensor([[draw(probs[0], next(waiting))]])
        )
        ids, text, choices = tokenizer.encode(prompt), [], []
        for token, routings in stream(model, ids[None], 150, temperature=temperature, top_k=top_k):
            text.append(token.item())
            choices.append([routing.gates[0, -1].topk(2).indices.tolist() for routing in routings])
        job = dict(ids=ids.tolist(), temperature=temperature, topK=top_k or 0, numbers=numbers.tolist())
        jobs.append((job, text, choices))
    program = """
      answer(facts.jobs.map(({ ids, temperature, topK, numbers }) => {
        const writer = new Writer(build(facts), ids), text = [], choices = [];
        for (const number of numbers) {
          const said = writer.read(), last = said[said.length - 1];
          const token = draw(nextProbs(last.logits, temperature, topK), number);
          text.push(token);
          choices.push(last.routings.map(({ experts }) => experts));
          writer.add(token);
        }
        return { text, choices };
      }));"""
    for said, (_, text, choices) in zip(in_node(program, handed(model) | dict(jobs=[job for job, *_ in jobs])), jobs):
        assert said["text"] == text and said["choices"] == choices


def uniform_numbers(seed, count):
    "The page's own random numbers (mulberry32), as Python has them."
    numbers, state, mask = [], seed & 0xFFFFFFFF, 0xFFFFFFFF
    for _ in range(count):
        state = (state + 0x6D2B79F5) & mask
        t = (state ^ (state >> 15)) * (1 | state) & mask
        t = ((t + ((t ^ (t >> 7)) * (61 | t) & mask)) & mask) ^ t
        numbers.append(((t ^ (t >> 14)) & mask) / 2**32)
    return numbers


def routed(model, layer, change):
    "Let `change(x, routing)` make the routing of one layer; the handle that it returns undoes it."
    router = model.blocks[layer].moe.router
    return router.register_forward_hook(lambda router, inputs, routing: change(inputs[0], routing))


@needs_node
def test_knock_outs_and_other_routers_are_those_of_a_patched_model(lab):
    model, tokenizer, passage = lab
    ids = tokenizer.encode(passage)[:129].long()
    L, E, C = model.config.n_layer, model.config.num_experts, model.config.n_embd
    none = [[False] * E for _ in range(L)]

    def silent(*pairs):
        return [[(layer, e) in pairs for e in range(E)] for layer in range(L)]

    def gates(off):
        return lambda layer: lambda x, routing: replace(routing, gates=routing.gates * ~torch.tensor(off[layer]))

    def next_best(off):
        return lambda layer: lambda x, routing: top_k_gating(
            routing.logits.masked_fill(torch.tensor(off[layer]), -math.inf), 2
        )

    def random(layer):
        weight = torch.tensor(uniform_numbers(layer + 1, E * C)).view(E, C) - 0.5
        return lambda x, routing: top_k_gating(x @ weight.T, 2)

    def hashed(layer):
        scores = torch.tensor([uniform_numbers(1009 * token + layer, E) for token in range(model.config.vocab_size)])
        windows = ids[:-1].view(-1, model.config.block_size)
        return lambda x, routing: top_k_gating(scores[windows], 2)

    one, more, layer0 = silent((0, 3)), silent((0, 1), (1, 5), (2, 0), (2, 7)), silent(*((0, e) for e in range(E)))
    cases = [
        (dict(off=none), lambda layer: lambda x, routing: routing),
        (dict(off=one), gates(one)),
        (dict(off=more), gates(more)),
        (dict(off=layer0), gates(layer0)),
        (dict(off=more, nextBest=True), next_best(more)),
        (dict(off=none, router="random"), random),
        (dict(off=none, router="hash"), hashed),
    ]
    program = """answer(facts.cases.map((changes) => {
      let sum = 0;
      for (const loss of losses(build(facts, changes), facts.ids)) sum += loss;
      return sum / (facts.ids.length - 1);
    }));"""
    said = in_node(program, handed(model) | dict(cases=[case for case, _ in cases], ids=ids.tolist()))
    for (changes, make), loss in zip(cases, said):
        hooks = [routed(model, layer, make(layer)) for layer in range(L)]
        wanted = estimate_loss(model, ids)[0]
        for hook in hooks:
            hook.remove()
        assert loss == pytest.approx(wanted, abs=1e-5), changes
    assert len({round(loss, 3) for loss in said}) == len(cases)


@needs_node
def test_pieces_of_the_engine_at_their_edges():
    points = torch.linspace(-7, 7, 401)
    logits = [[0.0, 1.0, 1.0, -1.0], [1000.0, 999.0, -1000.0, 0.0], [3.0, 3.0, 3.0, 3.0]]
    said = in_node(
        """answer({
          erf: facts.points.map(erf),
          dice: [0, 1, 4294967295].map((seed) => { const d = dice(seed); return [d(), d(), d()]; }),
          draw: [0, 0.1, 0.29, 0.999, 0.99999999999].map((u) => draw([0, 0.1, 0.2, 0.7 - 1e-9, 0], u)),
          probs: facts.logits.map((row) => [[1, 0], [0, 0], [0.5, 2], [2, 9]].map(([t, k]) => nextProbs(row, t, k))),
        });""",
        dict(points=points.tolist(), logits=logits),
    )
    assert (torch.tensor(said["erf"]) - torch.erf(points)).abs().max() < 1e-6
    assert said["dice"] == [uniform_numbers(seed, 3) for seed in (0, 1, 4294967295)]
    assert said["draw"] == [1, 2, 2, 3, 3]
    for row, theirs in zip(logits, said["probs"]):
        for (temperature, k), probs in zip([(1, None), (0, None), (0.5, 2), (2, 9)], theirs):
            wanted = next_token_probs(torch.tensor(row), temperature, k)
            assert torch.allclose(torch.tensor(probs).float(), wanted, atol=1e-6), (row, temperature, k)


# The file ------------------------------------------------------------------------------------------------------------


def small(text="\n abcdehlor:", **changes):
    tokenizer = CharTokenizer(text)
    config = MoEConfig(**SIZES | dict(vocab_size=tokenizer.vocab_size, num_experts=4) | changes)
    return strong(SparseMoELanguageModel(config)), tokenizer


def test_what_the_page_cannot_run_is_refused_in_one_line(tmp_path):
    path = tmp_path / "page.html"

    def fails(change=lambda model: None, *words, **changes):
        model, tokenizer = small(**changes)
        change(model)
        refuses(ValueError, lambda: write_page(path, model, tokenizer), *words)
        assert not path.exists()

    fails(lambda model: None, "CapacityRouter", capacity_factor=1.25)
    fails(lambda model: setattr(model.blocks[1].moe, "router", torch.nn.Identity()), "Identity", 1)
    fails(lambda model: setattr(model.blocks[0].moe.router, "top_k", 1), "top_k")
    fails(lambda model: model.lm_head.weight.data.fill_(math.nan), "lm_head.weight", "finite")
    fails(lambda model: model.blocks[0].moe.experts.up.data.mul_(1e38).mul_(1e38), "finite")
    fails(lambda model: model.to("meta"), "finite")
    fails(lambda model: setattr(model, "lm_head", torch.nn.Linear(16, 5)), "shapes")
    fails(lambda model: model.blocks.append(model.blocks[0]), "shapes")
    model, tokenizer = small()
    refuses(ValueError, lambda: write_page(path, model, CharTokenizer("ab")), 2, tokenizer.vocab_size)
    refuses(ValueError, lambda: write_page(path, model, tokenizer, weights="int4"), "int4", "int8")
    refuses(ValueError, lambda: write_page(path, model, tokenizer, moments=[("early", small(top_k=1)[0])]), "early")
    model.lm_head.weight.data[0, 0] = 1e6
    refuses(ValueError, lambda: write_page(path, model, tokenizer, weights="float16"), "lm_head.weight", "float16")
    write_page(path, model.bfloat16(), tokenizer)  # another type is no reason
    assert path.exists()


def read_page(path):
    "(text of the page, its facts)."
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search('id="facts">(.*?)</script>', text, re.DOTALL)[1])


def test_hostile_texts_stay_data(tmp_path):
    hostile = "</script><script>alert(1)</script>\"'`&lt;{{weights}}{{facts}}${1}\u2028\u0000🎭\\u003c"
    model, tokenizer = small(text=hostile)
    write_page(tmp_path / "page.html", model, tokenizer, passage=hostile, prompt=hostile + "я")
    text, facts = read_page(tmp_path / "page.html")
    assert text.count("<script") == text.count("</script>") == 4 and "alert(1)<" not in text
    assert facts["characters"] == list(tokenizer.characters) and facts["prompt"] == hostile
    assert tokenizer.decode(facts["passage"]) == hostile
    assert "{{" not in text.split('id="engine"')[0].replace(json.dumps(hostile)[1:-1].replace("<", "\\u003c"), "")
    lone = CharTokenizer("\ud83c\udfad a")  # half a character each, in a vocabulary of bytes gone wrong
    write_page(tmp_path / "lone.html", small("xyz ")[0], lone)
    assert read_page(tmp_path / "lone.html")[1]["characters"] == list(lone.characters)


def test_a_page_needs_no_other_file_and_nobody_waits_for_it(lab, tmp_path):
    model, tokenizer, passage = lab
    path = tmp_path / "page.html"
    assert make_page(ROOT / "data" / "lab.safetensors", path) == path.stat().st_size < 2e6
    text, facts = read_page(path)
    assert "http" not in text.replace("http-equiv", "") and not re.search(r"\b(src|href)=\"(?!data:,)", text)
    assert "default-src 'none'" in text and "unsafe" not in text and "connect" not in text
    assert len(facts["passage"]) == 513 and facts["prompt"] == "Romeo:"
    committed, theirs = read_page(ROOT / "data" / "page.html")
    how = "python -m makemoe page data/lab.safetensors --out data/page.html"
    assert committed == text, f"data/page.html is not what the code makes: {how}"


def test_moments_beside_a_checkpoint_are_found(tmp_path):
    model, tokenizer = small()
    for name in "step 000000", "step 000100":
        save_checkpoint(tmp_path / "moments" / f"{name}.safetensors", model, tokenizer)
    save_checkpoint(tmp_path / "model.safetensors", model, tokenizer)
    make_page(tmp_path, tmp_path / "page.html")
    facts = read_page(tmp_path / "page.html")[1]
    assert [moment["label"] for moment in facts["moments"]] == ["step 000000", "step 000100", "finished"]
    assert facts["passage"] == []  # the model does not know all characters of the plays


def test_the_laptop_preset_fits(tmp_path, lab):
    model, tokenizer = SparseMoELanguageModel(MoEConfig.laptop()), lab[1]
    write_page(tmp_path / "page.html", model, tokenizer, passage=lab[2])
    assert (tmp_path / "page.html").stat().st_size < 6.5e6


def contrast(one, other):
    "Of two colours #rrggbb, as WCAG has it."
    lights = []
    for colour in one, other:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def test_the_colours_can_be_told_apart_and_read_on():
    "Machado et al. 2009: how colours look without one kind of cones; then the distance in Oklab (just noticeable: 2)."
    style = (FOLDER / "page.html").read_text(encoding="utf-8")
    blind = torch.tensor([
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ])
    cones = torch.tensor([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    oklab = torch.tensor([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    colours = re.findall(r"--e\d: (#\w{6})", style)
    assert len(colours) == 16
    for mode in colours[:8], colours[8:]:
        rgb = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in mode])
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        for seen in blind:
            lab = (linear @ seen.T).clamp(0, 1) @ cones.T
            lab = 100 * lab.sign() * lab.abs() ** (1 / 3) @ oklab.T
            assert (torch.cdist(lab, lab) + 100 * torch.eye(8)).min() > 8
        assert min(contrast(colour, "#11100e") for colour in mode) >= 4.5


def test_what_node_answered_is_stored_for_readers_without_it():
    stored = json.loads((ROOT / "data" / "node.json").read_text(encoding="utf-8"))
    names, asked = {}, set()
    for cell in read_cells(ROOT / "notebooks" / "17_page.ipynb"):
        for part in ast.walk(ast.parse(cell["source"])) if cell["cell_type"] == "code" else []:
            if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant):
                names[part.targets[0].id] = part.value.value
            if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "node":
                asked.add(eval(compile(ast.Expression(part.args[0]), "", "eval"), {"__builtins__": {}}, names))
    assert asked == set(stored), "run the lesson once more with MAKEMOE_STORE=1"


# In a browser --------------------------------------------------------------------------------------------------------


def start_browser():
    "Headless chromium, or the reason why there is none."
    try:
        from selenium import webdriver
    except ImportError:
        return "selenium is not installed"
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        return "Debian's chromium and chromium-driver are not installed"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    switches = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking no-first-run"
    for switch in f"{switches} disable-sync disable-component-update window-size=1280,950".split():
        options.add_argument(f"--{switch}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Reader:
    "A person with a browser."

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, pace=7):
        "Open a page, write as fast as it can from the beginning, and wait for the end."
        self.driver.get(path if "://" in str(path) else Path(path).as_uri())
        return self.set("pace", pace).wait()

    def js(self, code, *arguments):
        return self.driver.execute_script(f"return {code}", *arguments)

    def set(self, name, value):
        self.js("(e => { e.type === 'checkbox' ? e.checked = arguments[1] : e.value = arguments[1]; "
                "e.oninput?.(); e.onchange?.(); })($(arguments[0]))", name, value)
        return self

    def type(self, text):
        self.js("($('prompt').value = arguments[0], submit())", text)
        return self

    def click(self, selector, number=0):
        element = self.driver.find_elements("css selector", selector)[number]
        self.js("arguments[0].scrollIntoView({ block: 'center' })", element)
        element.click()
        return self

    def wait(self, seconds=30):
        end = time.monotonic() + seconds
        while self.js("writing || $('judge').classList.contains('stale') && passage.length > 1"):
            assert time.monotonic() < end, "it writes and writes"
            time.sleep(0.05)
        return self

    @property
    def text(self):
        return self.js("$('text').textContent")

    @property
    def note(self):
        return self.js("$('note').textContent")

    @property
    def loss(self):
        return float(self.js("$('judge').querySelector('strong').textContent").split()[0])

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def reader():
    driver = start_browser()
    if isinstance(driver, str):
        pytest.skip(driver)
    yield Reader(driver)
    driver.quit()


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory):
    "A page of the small model in float32, so that its numbers are PyTorch's."
    model, tokenizer, passage = lab
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, model, tokenizer, passage, weights="float32")
    return path


def written_by_pytorch(model, tokenizer, prompt, seed, monkeypatch, count=600):
    "(the text, for each character of it that was written the experts of each layer, the heaviest first)."
    numbers = iter(uniform_numbers(seed, count))
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "multinomial", lambda probs, n, generator=None: torch.tensor([[draw(probs[0], next(numbers))]])
        )
        steps = list(stream(model, tokenizer.encode(prompt)[None], count, temperature=0.8))
    choices = [[routing.gates[0, -1].topk(2).indices.tolist() for routing in routings] for _, routings in steps]
    return prompt + tokenizer.decode([token.item() for token, _ in steps]), choices


def test_a_reader_silences_an_expert_and_says_what_happened(reader, page, lab, monkeypatch):
    model, tokenizer, passage = lab
    ids = tokenizer.encode(passage).long()
    reader.open(page)
    plain = reader.text
    text, choices = written_by_pytorch(model, tokenizer, "Romeo:", 1, monkeypatch)
    assert plain == text
    assert reader.js("text.slice(5, 605).map(one => one.read.map(([experts]) => experts))") == choices
    assert reader.loss == pytest.approx(estimate_loss(model, ids)[0], abs=6e-4)
    shares = reader.js("cells.map(row => row.map(cell => +cell.lastChild.textContent))")
    assert all(96 <= sum(row) <= 104 for row in shares)
    reader.click(".cell", 3).wait()
    hook = routed(model, 0, lambda x, routing: replace(routing, gates=routing.gates * (torch.arange(8) != 3)))
    silenced, loss = written_by_pytorch(model, tokenizer, "Romeo:", 1, monkeypatch)[0], estimate_loss(model, ids)[0]
    hook.remove()
    assert reader.text == silenced and reader.loss == pytest.approx(loss, abs=6e-4)
    same = next(i for i, (a, b) in enumerate(zip(plain, silenced)) if a != b)
    assert f"The same for {same - 6} character" in reader.note
    assert reader.js("+document.querySelector('.differs').dataset.place") == same
    assert reader.js("cells[0][3].getAttribute('aria-pressed')") == "true"
    reader.click(".board-row > button", 1).wait()
    assert reader.js("off[1].every(Boolean)") and reader.loss > loss
    reader.click("#all").wait()
    assert reader.text == plain
    losses = {}
    for router in "random", "hash", "learned":
        reader.set("router", router).wait()
        losses[router] = reader.loss
    assert min(losses["random"], losses["hash"]) > losses["learned"] + 1
    assert reader.errors() == []


def test_the_training_is_played_back(reader, lab, tmp_path):
    model, tokenizer, passage = lab
    path, untrained = tmp_path / "page.html", SparseMoELanguageModel(model.config)
    write_page(path, model, tokenizer, passage, moments=[("step 0", untrained)])
    reader.open(path)
    end = reader.loss
    reader.set("moment", 0).wait()
    assert reader.js("$('moment-is').textContent") == "step 0"
    assert reader.loss == pytest.approx(math.log(64), abs=0.3)
    reader.js("$('play').click()")
    reader.wait()
    assert reader.js("$('moment-is').textContent") == "finished" and len(reader.text) == 6 + 150
    assert reader.loss == end and reader.errors() == []


def test_a_character_can_be_looked_at_and_another_one_picked(reader, page, lab):
    model, tokenizer, _ = lab
    reader.open(page)
    text = reader.text
    spans, place = "#text span", 100
    reader.click(spans, place)
    context = text[place - 34 : place]  # twice the newer half was read again: at 65 characters, and at 98
    probs = next_token_probs(model(tokenizer.encode(context)[None]).logits[0, -1].detach())
    likeliest = probs.topk(6)
    shown = reader.js(f"text[{place - 1}].next")
    assert [token for token, _ in shown] == likeliest.indices.tolist()
    assert torch.tensor([chance for _, chance in shown]).sub(likeliest.values).abs().max() < 1e-4
    assert reader.js("document.querySelectorAll('#card button:not(.shut)').length") == 6
    assert reader.js("$('card').hidden === false && document.querySelectorAll('.cell.in').length") == 6
    assert "layer 2" in reader.js("$('card').textContent") and "Layer 2" in reader.js("$('say').textContent")
    token = reader.js(f"text[{place - 1}].next[3][0]")
    reader.js("[...document.querySelectorAll('#card button:not(.shut)')][3].click()")
    reader.wait()
    assert reader.text[: place + 1] == text[:place] + tokenizer.characters[token]
    assert len(reader.text) == place + 1 + 600
    from selenium.webdriver.common.keys import Keys

    box = reader.driver.find_element("id", "text")  # the keyboard: to the end, back, to the choices, and out
    box.send_keys(Keys.END)
    assert reader.js("cursor === text.length - 1")
    box.send_keys(Keys.ARROW_LEFT)
    box.send_keys(Keys.ENTER)
    assert reader.js("$('card').contains(document.activeElement)")
    reader.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert reader.js("$('card').hidden && document.activeElement === $('text')")
    inside = "(b => b.top >= 0 && b.bottom <= innerHeight && b.left >= 0 && b.right <= innerWidth)"
    for place in 0, 300, 700:
        reader.js(f"open({place}, true)")
        assert reader.js(f"{inside}($('card').getBoundingClientRect())")
    reader.js("point({ layer: 0, e: 3 })")
    bright = reader.js("text.filter(one => !one.span.classList.contains('dim')).map(one => one.span.dataset.expert)")
    assert set(bright) == {"3"} and "Layer 0, expert 3: first choice for" in reader.js("$('board-help').textContent")


def test_ten_quick_restarts_end_in_the_right_text(reader, page):
    reader.open(page).set("seed", 9).wait()
    wanted = reader.text
    for seed in range(10):
        reader.set("seed", seed)
        time.sleep(0.03 * (seed % 3))
    assert reader.wait().text == wanted
    for prompt in ("Juliet:", "Romeo:"):
        reader.type(prompt)
    assert reader.wait().text == wanted and reader.errors() == []


def test_hostile_prompts_and_vocabularies(reader, page, tmp_path):
    reader.open(page)
    plain = reader.text
    reader.type("</script><img src=x onerror=alert(1)>").wait()
    assert reader.text.startswith("scriptimg srcx onerroralert") or reader.text.startswith("script")
    assert "“<”" in reader.note and "left out" in reader.note
    start = time.monotonic()
    reader.type("Romeo: my love. " * 65536)  # a megabyte
    assert reader.wait().js("text.length") == 2000 + 600 and "last 2000" in reader.note
    assert time.monotonic() - start < 20
    reader.type("ю" * 3000).wait()
    assert reader.text.startswith("\n") and len(reader.text) == 601
    assert reader.type("").wait().text.startswith("\n")
    assert reader.type("Romeo:").wait().text == plain
    hostile = "</script><b>\"'`&amp;{{weights}}🎭é\n ab"
    model, tokenizer = small(text=hostile, num_experts=11, block_size=40)
    write_page(tmp_path / "page.html", model, tokenizer, prompt=hostile)
    reader.open(tmp_path / "page.html")
    assert reader.text.startswith(hostile) and len([*reader.text]) == len(hostile) + 600
    reader.type("e\u0301🎭").wait()  # é in two parts
    assert reader.text.startswith("é🎭")
    assert reader.js("document.querySelectorAll('#text img, #text b').length") == 0
    assert reader.js("$('judge').hidden") and reader.errors() == []


def test_no_request_leaves_the_page(reader, page):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(page.read_bytes())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader.driver.get_log("performance")
        reader.open(f"http://127.0.0.1:{server.server_port}/")
        reader.js("fetch(location.href).catch(() => { window.forbidden = true; })")
        reader.js("(i => { i.src = '/x.png'; document.body.append(i); })(new Image())")
        time.sleep(0.3)
        assert reader.js("window.forbidden") and asked == ["/"]
        server.shutdown()
    urls = [json.loads(entry["message"])["message"] for entry in reader.driver.get_log("performance")]
    sent = [one["params"]["request"]["url"] for one in urls if one["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in sent if "/x.png" not in url} <= {"http", "blob", "data"}
    reader.errors()  # those that we provoked


def test_it_works_without_a_worker_and_on_a_phone(reader, page):
    reader.open(page)
    wanted = reader.text
    command = reader.driver.execute_cdp_cmd
    script = command("Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.Worker;"})
    command("Emulation.setDeviceMetricsOverride", dict(width=390, height=844, deviceScaleFactor=1, mobile=True))
    try:
        reader.open(page)
        assert reader.js("typeof Worker") == "undefined" and reader.text == wanted
        assert reader.js("document.documentElement.scrollWidth") <= 390
        heights = reader.js("[...document.querySelectorAll('button')].map(b => b.offsetHeight).filter(Boolean)")
        assert min(heights) >= 24
        unnamed = "[...document.querySelectorAll('input, select, textarea, button')].filter(e => !e.labels?.length && "
        assert reader.js(unnamed + "!e.textContent.trim() && !e.ariaLabel && e.id !== 'prompt').length") == 0
    finally:
        command("Page.removeScriptToEvaluateOnNewDocument", script)
        command("Emulation.clearDeviceMetricsOverride", {})
    assert reader.errors() == []
