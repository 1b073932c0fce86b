from os import _exit, write
from signal import SIGINT, signal
signal(SIGINT, lambda *_: _exit(130 if write(2, b"makemoe: stopped\n") else 1))  # imports take seconds
from makemoe import expert_parallel, page, shakespeare  # noqa: E402
from makemoe import bias_balancing, expert_choice, fill_gaps, second_expert  # noqa: E402, F401
from makemoe import smooth_choice, st_moe, switch  # noqa: E402, F401


def write_page(checkpoint: str = "", /, out: str = "page.html", weights: str = "int8"):
    "Make a web page in which a model writes, by default the newest below runs. Weights: int8, float16 or float32."
    print(f"{out}: {page.make_page(shakespeare.find_checkpoint(checkpoint), out, weights) / 1e6:.1f} MB")


shakespeare.COMMANDS["page"], shakespeare.MORE_RESULTS["page.html"] = write_page, page.write_page
shakespeare.RESULTS["page.html"] = "the model itself, in a page for a browser"
shakespeare.COMMANDS["train"] = expert_parallel.train_together
shakespeare.main()
