"""`python -m lisatune`, which is also what `torchrun -m lisatune` starts on every rank."""

import sys

from lisatune.cli import main

sys.exit(main())
