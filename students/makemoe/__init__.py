"The finished modules. Under pytest those that are being tested come from mine/ instead: see conftest.py."

import os

if "MAKEMOE_MINE" in os.environ:
    __path__.insert(0, os.environ["MAKEMOE_MINE"])
