import sys

from kdjax.report.command import main

sys.exit(main(sys.argv))
