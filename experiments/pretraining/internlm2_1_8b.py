"""InternLM2-1.8B from scratch: the recipe of internlm2_7b.py at another size (report, Table 3).

Needs   : as internlm2_7b.py
Mesh    : 64 chips of v5e or more; see internlm2_7b.py
Expect  : not trained by us
Run     : internlm2 plan experiments/pretraining/internlm2_1_8b.py --topology v5p:4x4x4
          internlm2 run  experiments/pretraining/internlm2_1_8b.py --set data=/path/to/data
"""

from __future__ import annotations

import functools
from pathlib import Path

from internlm2_jax import config

_base = config.module(Path(__file__).with_name("internlm2_7b.py"))

experiment = functools.partial(_base.experiment, size="internlm2_1_8b")
tiny = _base.tiny
