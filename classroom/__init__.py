"""For teachers: hand out the lessons without answers, and grade what comes back. `python -m classroom --help`."""
