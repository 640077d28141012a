import os

import torch

# Triton reads this when it is first imported, which transformers does: before any conftest could set it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
