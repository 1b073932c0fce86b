"""Lesson 00. Pictures are tested by what they hold: the cells, letters, colours and curves that were drawn."""

import colorsys

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from classroom.hidden import lab as hidden
from makemoe import lab
from makemoe.checks import lab as visible


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_checks_of_the_lesson():
    for checks in visible, hidden:
        checks.check_seed_everything(lab.seed_everything)
        checks.check_text_to_spans(lab.text_to_spans)


def test_the_device_exists():
    device = lab.pick_device()
    assert torch.ones(2, device=device).sum() == 2
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device == "cpu"


def test_gates_are_drawn_with_tokens_along_the_line():
    gates = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]])
    lab.show_gates(gates, "a\n", "title")
    ax = plt.gca()
    assert torch.equal(torch.as_tensor(ax.collections[0].get_array().data), gates.T) and ax.yaxis_inverted()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "⏎"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["expert 0", "expert 1", "expert 2"]
    assert {text.get_text() for text in ax.texts} == {"1.00", "0.25", "0.75"}
    assert ax.get_title(loc="left") == "title"


def test_no_two_experts_share_a_colour():
    colors = [lab.expert_color(e) for e in range(256)]
    assert len(set(colors)) == 256
    assert all(0 <= channel <= 1 for color in colors for channel in color)
    apart = torch.cdist(torch.tensor(colors[:16]), torch.tensor(colors[:16])) + torch.eye(16)
    assert apart.min() > 0.15, "the first sixteen can be told apart"
    hue, _, _ = colorsys.rgb_to_hls(*lab.expert_color(0))
    assert colorsys.rgb_to_hls(*lab.expert_color(0, 0.5))[0] == pytest.approx(hue)
    assert lab.expert_color(3, 0) == (1, 1, 1)


def test_text_is_drawn_on_the_colours_of_its_experts():
    lab.show_text("ab\ncdef", [0, None, 0, 3, 11, 0, 0], width=3)
    ax = plt.gca()
    letters = {text.get_position(): text.get_text() for text in ax.texts}
    assert letters == {(0, 0): "a", (1, 0): "b", (0, 1): "c", (1, 1): "d", (2, 1): "e", (0, 2): "f"}
    colors = {letters[box.get_x() + 0.5, box.get_y() + 0.5]: box.get_facecolor() for box in ax.patches}
    for letter, e in ("a", 0), ("c", 3), ("d", 11):
        assert colors[letter][:3] == pytest.approx(lab.expert_color(e, 0.55))
    assert colors["b"][3] == 0, "a character without an expert has no colour"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["expert 0", "expert 3", "expert 11"]


@pytest.mark.parametrize("text", ["", "\n", "abc\n\n", "x" * 200])
def test_any_text_can_be_drawn(text):
    lab.show_text(text, [1] * len(text))
    plt.gcf().canvas.draw()


def test_text_and_experts_must_be_equally_long():
    for draw in lab.show_text, lambda text, experts: lab.text_to_html(text, experts, ""):
        with pytest.raises(ValueError, match="3 characters but 2 experts"):
            draw("abc", [1, 2])


def test_a_page_holds_the_text_and_its_colours_and_loads_nothing():
    text, experts = "\nK<&\n<b>", [None, 3, 1, 0, 7, 2, None, 12]
    page = lab.text_to_html(text, experts, "a <title>")
    visible.reads_as(page.split("<pre>")[1].split("</pre>")[0], text, experts)
    assert page.count("a &lt;title>".replace(">", "&gt;")) == 2
    assert not any(word in page for word in ("src=", "href=", "http"))
    for e in (0, 1, 2, 3, 7, 12):
        color = page.split(f".e{e} {{ background: ")[1][:7]
        assert to_rgb(color) == pytest.approx(lab.expert_color(e, 0.55), abs=0.01)


LESSONS = """lab data attention experts gating noisy_gating sparse_moe capacity losses dropless model training
generation twins optimizers checkpoints shakespeare page""".split()


@pytest.mark.parametrize("here", LESSONS)
def test_the_map_marks_one_place_and_no_words_overlap(here):
    lab.show_map(here)
    plt.gcf().canvas.draw()
    ax = plt.gca()
    number = f"{LESSONS.index(here):02d}"
    marked = [patch.get_bbox() for patch in ax.patches if patch.get_facecolor() == (*to_rgb("#ffd166"), 1)]
    assert marked
    place = next(text for text in ax.texts if text.get_text().startswith(number)).get_position()
    assert any(box.x0 <= place[0] <= box.x1 and box.y0 <= place[1] <= box.y1 for box in marked)
    words = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert not [(a, b) for i, a in enumerate(words) for b in words[:i] if a.overlaps(b)]


def test_the_map_refuses_a_lesson_that_it_does_not_know():
    with pytest.raises(ValueError, match="there is no lesson 'gate': choose from lab, data, attention") as raised:
        lab.show_map("gate")
    assert "\n" not in str(raised.value)


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
    found = [[text.get_text() for text in panel.texts] for panel in plt.gcf().axes]
    assert found == [["imbalance 1.50"], ["imbalance 1.00"]]
    lab.show_load(HISTORY + [dict(HISTORY[0], step=300, load=[[0, 8], [6, 10]], dropped=[0.125, 0])])
    found = [[text.get_text() for text in panel.texts] for panel in plt.gcf().axes]
    assert found == [["imbalance 2.00\ndropped 12.5%"], ["imbalance 1.25\ndropped 0.0%"]]


def test_live_plots_draw_what_came_so_far(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda figure: shown.append(len(figure.axes)))
    monkeypatch.setattr(IPython.display, "clear_output", lambda wait: shown.clear())
    draw = lab.live_plots()
    for record in HISTORY:
        draw(record)
    assert shown == [1, 2] and not plt.get_fignums(), "two pictures, and none stays open"
