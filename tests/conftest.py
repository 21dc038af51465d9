"""For all tests: the processes of Ray get as much of a CPU as others that run beside them."""

import os

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves them a thirtieth of what the others get
