"""Robot logs in, training windows out: contracts, bags, alignment, LeRobot datasets. NumPy only."""

import os

# Read by OpenCV when it is loaded. Damaged pictures are told in one sentence, which its own lines would bury,
# and no picture is made that only a header asks for (`stills.MOST_PIXELS`).
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))
