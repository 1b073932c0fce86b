from os import _exit, write
from signal import SIGINT, signal

signal(SIGINT, lambda *_: _exit(130 if write(2, b"makemoe: stopped\n") else 1))  # the imports take seconds: no traceback
__import__("makemoe.shakespeare").shakespeare.main()
