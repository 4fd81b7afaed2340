import sys

from copra_llm.cli import main

sys.exit(main())
