"""`python -m finetune_nb.cli`."""

from .main import main

raise SystemExit(main())
