"""InternLM2-20B from scratch: the recipe of internlm2_7b.py at another size (report, Table 3).

Needs   : as internlm2_7b.py
Mesh    : 64 chips of v5p or more; see internlm2_7b.py
Expect  : not trained by us
Run     : internlm2 plan experiments/pretraining/internlm2_20b.py --topology v5p:4x4x4
          internlm2 run  experiments/pretraining/internlm2_20b.py --set data=/path/to/data
"""

from __future__ import annotations

import functools
from pathlib import Path

from internlm2_jax import config

_base = config.module(Path(__file__).with_name("internlm2_7b.py"))

experiment = functools.partial(
    _base.experiment,
    size="internlm2_20b",
    batch_tokens=5 * 2**20,
    layout="fsdp=32,tensor=2",
    rows_at_once=128,
    long_rows_at_once=32,
)
tiny = _base.tiny
