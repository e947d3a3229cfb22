"""Python runs this as it starts, where this folder is on PYTHONPATH: importing transformers fails.

mmengine imports transformers where it is installed, for one optimizer's sake, and transformers
imports peft: half of the seconds that a program of mmengine's takes to start.
"""

import sys

sys.modules["transformers"] = None  # type: ignore[assignment]
