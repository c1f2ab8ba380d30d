"""Make `import torchvision` work beside a torch build that its compiled operators do not match.

timm and open_clip import torchvision at their first line. A CPU-only torch next to the registry's
torchvision then fails with "operator torchvision::nms does not exist", because torchvision
registers shape functions for two operators whose schemas its extension would have declared.
Import this module before either; where torchvision is whole it changes nothing. Where it is not,
the two schemas are declared without kernels: transforms work, detection operators stay unusable.
"""

from __future__ import annotations

import logging
import sys

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    logging.getLogger("speciesmap").debug(
        "torchvision's compiled operators do not load beside torch %s; declaring nms and qnms "
        "so that it imports (detection operators stay unusable)",
        torch.__version__,
    )
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    torch.library.define("torchvision::nms", SCHEMA)
    torch.library.define("torchvision::qnms", SCHEMA)
    import torchvision  # noqa: F401
