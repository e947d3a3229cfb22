import sys

from ema_fused.cli import main

sys.exit(main())
