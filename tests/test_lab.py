"""Lesson 00. Pictures are tested by what they hold: the cells, letters, colours and curves that were drawn."""

import html.parser
import random

import matplotlib.pyplot as plt
import pytest
import torch

from makemoe import lab


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_seeds_repeat_all_random_numbers():
    def draw():
        lab.seed_everything(7)
        return random.random(), torch.rand(3).tolist()

    assert draw() == draw()
    first = draw()
    lab.seed_everything(8)
    assert random.random() != first[0] and torch.rand(3).tolist() != first[1]


def test_the_seed_is_1337_unless_another_is_given_and_0_is_another():
    def draw(*seed):
        lab.seed_everything(*seed)
        return random.random(), torch.rand(3).tolist()

    assert draw() == draw(1337)
    assert all(ours != theirs for ours, theirs in zip(draw(0), draw()))
    for seed in 0, 123456:
        ours = draw(seed)
        torch.manual_seed(seed)
        random.seed(seed)
        assert ours == (random.random(), torch.rand(3).tolist())


def test_the_device_exists():
    device = lab.pick_device()
    assert torch.ones(2, device=device).sum() == 2
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device == "cpu"


def test_gates_are_drawn_with_tokens_along_the_line():
    gates = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]])
    lab.show_gates(gates, "a\n", "title")
    ax = plt.gca()
    assert torch.equal(torch.as_tensor(ax.images[0].get_array().data), gates.T)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "⏎"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["expert 0", "expert 1", "expert 2"]
    assert {text.get_text() for text in ax.texts} == {"1.00", "0.25", "0.75"}
    assert ax.get_title(loc="left") == "title"


def test_text_is_drawn_on_the_colours_of_its_experts():
    lab.show_text("ab\nc", [0, None, 0, 3])
    letters = {text.get_text(): text.get_bbox_patch().get_facecolor() for text in plt.gca().texts}
    assert set(letters) == {"a", "b", "c"}
    assert letters["a"][:3] == pytest.approx(lab.expert_color(0))
    assert letters["c"][:3] == pytest.approx(lab.expert_color(3))
    assert letters["b"][3] == 0, "a character without an expert has no colour"


def test_text_and_experts_must_be_equally_long():
    for draw in lab.show_text, lambda text, experts: lab.text_to_html(text, experts, ""):
        with pytest.raises(ValueError, match="3 characters but 2 experts"):
            draw("abc", [1, 2])


class Page(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__(convert_charrefs=False)
        self.inside, self.pre, self.experts, self.links = [], "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if ("pre", None) in self.inside:
            assert tag == "span"
        if "title" in attributes:
            assert attributes["class"] == attributes["title"].replace("expert ", "e")
        if tag not in ("meta", "br"):
            self.inside.append((tag, attributes.get("title")))

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_entityref(self, name):
        self.handle_data(html.unescape(f"&{name};"), escaped=True)

    def handle_charref(self, name):
        self.handle_entityref("#" + name)

    def handle_data(self, data, escaped=False):
        if ("pre", None) in self.inside:
            assert escaped or not {"<", "&"} & set(data)
            self.pre += data
            title = self.inside[-1][1]
            self.experts += [title and int(title.removeprefix("expert "))] * len(data)


def test_html_holds_the_text_and_its_experts_and_stands_alone():
    text, experts = "\nK<&é:\n<b>&\"X\t &lt;' ", [None] * 6 + [3, 1, 1, 0, 7, 2, 2, 2, None, 0, 0, None, 12, 3, None]
    source = lab.text_to_html(text, experts, "a <title>")
    assert all(f".e{e} {{" in source for e in (0, 1, 2, 3, 7, 12))
    page = Page(source)
    assert page.pre == text
    assert page.experts == experts
    assert page.links == [], "a page that stands alone loads nothing"


HISTORY = [dict(step=s, train_loss=4 - s / 100, val_loss=4 - s / 200, load=[[10, 30], [20, 20]]) for s in (0, 100, 200)]


def test_losses_are_drawn_over_steps():
    lab.show_loss(HISTORY)
    curves = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in plt.gca().lines}
    assert curves == {"train loss": ([0, 100, 200], [4, 3, 2]), "val loss": ([0, 100, 200], [4, 3.5, 3])}


def test_loads_are_drawn_as_shares_one_panel_a_layer():
    lab.show_load(HISTORY)
    panels = plt.gcf().axes
    assert len(panels) == 2
    ribbons = [[ribbon.get_paths()[0].get_extents().height for ribbon in panel.collections] for panel in panels]
    assert ribbons == [pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5])]


def test_imbalance_and_dropped_share_of_each_layer_stand_beside_its_panel():
    lab.show_load(HISTORY)  # records of before there was a dropped share
    assert [[text.get_text() for text in panel.texts] for panel in plt.gcf().axes] == [["imbalance 1.50"], ["imbalance 1.00"]]
    lab.show_load(HISTORY + [dict(HISTORY[0], step=300, load=[[0, 8], [6, 10]], dropped=[0.125, 0])])
    found = [[text.get_text() for text in panel.texts] for panel in plt.gcf().axes]
    assert found == [["imbalance 2.00\ndropped 12.5%"], ["imbalance 1.25\ndropped 0.0%"]]
