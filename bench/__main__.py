"""`python -m bench` (`make bench`): all benchmarks, or those named."""

import argparse
from collections.abc import Callable

from bench import (
    edge,
    engine_core,
    engine_process,
    fanout,
    market_checkpoint,
    order_pipeline,
    own_writes,
    revocation,
    risk,
)

BENCHMARKS: dict[str, Callable[[], None]] = {
    "order_pipeline": order_pipeline.main,
    "own_writes": own_writes.main,
    "engine_core": engine_core.main,
    "engine_process": engine_process.main,
    "market_checkpoint": market_checkpoint.main,
    "fanout": fanout.main,
    "risk": risk.main,
    "revocation": revocation.main,
    "edge": edge.main,
}


def main() -> None:
    """Entry. Each benchmark prints its figures and ends the process with 1 when its audit is not clean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which ones; all by default")
    for name in parser.parse_args().names or BENCHMARKS:
        print(f"== {name}")
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
