"""web_text with every bound that it sets itself made as small as its input is here.

    python -m scaled --input DIR --output DIR --shards N --wave-bytes N [Beam options]

A worker of `web_text` may hold a wave of files, a shard of documents and a partition of what
de-duplication compares: 256, 128 and 32 MB, far more than a test's whole input. With these bounds a
test of some megabytes shows what a corpus of some terabytes would.
"""

from __future__ import annotations

import argparse

from data_beam.dedup.near import NearDuplicates
from data_beam.pipelines import web_text

PARTITION = 1 << 20  # 1/32 of the default


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--wave-bytes", type=int)
    known, beam_options = parser.parse_known_args()
    near = NearDuplicates(partition_bytes=PARTITION, max_memory=2 * PARTITION)
    web_text.run(
        [known.input],
        known.output,
        web_text.WebText(near=near),
        shards=known.shards,
        wave_bytes=known.wave_bytes,
        beam_options=beam_options,
    )


if __name__ == "__main__":
    main()
