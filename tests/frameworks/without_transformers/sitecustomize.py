"""Python runs this as it starts, where this folder is on PYTHONPATH: two imports fail.

mmengine imports transformers where it is installed, for one optimizer's sake, transformers imports
peft, and mmengine deepspeed: most of the seconds that a program of mmengine's takes to start.
"""

import sys

sys.modules["transformers"] = None  # type: ignore[assignment]
sys.modules["deepspeed"] = None  # type: ignore[assignment]
