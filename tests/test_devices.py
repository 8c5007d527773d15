"""What the package does on a GPU, as far as it can be told without one: on a pretended one, in a process of its own."""

import subprocess
import sys


def test_everything_works_on_a_device_that_is_not_the_cpu():
    """Nothing is made on the wrong device, results are the CPU's, and decoding waits for the device once a token."""
    done = subprocess.run([sys.executable, "-m", "tests.on_pretended_gpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("as on the CPU") > 40
