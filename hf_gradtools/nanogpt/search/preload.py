"""What a training imports, for the process from which those of runs are forked: seconds that each of them saves."""

from hf_gradtools.workflow.terminal import quiet_imports


quiet_imports()

import hf_gradtools.nanogpt.training.train  # noqa: E402, F401
