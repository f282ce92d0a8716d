"""`python -m finetune_nb`: the command line."""

from .cli.main import main

raise SystemExit(main())
