import sys

from kdjax.scaling.command import main

sys.exit(main(sys.argv))
