"""What a training imports, for the process from which those of runs are forked: seconds that each of them saves.

Only where there is no GPU. Some of the imports (bitsandbytes among them) start CUDA, and a process that is forked from
one in which it has been started cannot use it. Counting devices does not start it.
"""

import torch

from hf_gradtools.workflow.terminal import quiet_imports


quiet_imports()
if torch.cuda.device_count() == 0 and torch.version.xpu is None:
    from hf_gradtools.nanogpt.training import train  # noqa: F401
