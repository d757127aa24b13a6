import sys

from kdjax.export.command import main

sys.exit(main(sys.argv))
