"""`benchmarks.forward` as a T0 is run: in bfloat16, 16 encoder tokens and 1 decoder token.

python -m benchmarks.t0_forward --engine hf_bigload --checkpoint /data/t0pp --max-memory cpu=8GB
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import forward

AS_A_T0 = ("--dtype", "bfloat16", "--tokens", "16")


def main(argv: Sequence[str] | None = None) -> None:
    forward.main([*AS_A_T0, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
