"""`python -m seg3d_monai` is the command `seg3d`."""

import sys

from seg3d_monai.cli import main

if __name__ == "__main__":
    sys.exit(main())
