"""Whether the first step of a run is repeatable: MKL's vector functions when two threads call them for the first time.

    python benchmarks/first_use.py [--starts 3000]

A process that has imported torch and computed nothing is forked again and again. Each child takes functions of the
same 51,648 numbers twice with two threads, another one first in each child, and compares: a right first call equals the
second to the bit. Once as torch comes, and once after `import litrecipe.model.first_use`, as the decoder does, which
calls the functions on one thread before. Exits with 1 if any start of the latter differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

from common import REPO, print_table, run_child, write_result

FUNCTIONS = ("exp", "log", "tanh", "erf")
SIZE = 1614 * 32


def starts(count: int, warmed: bool) -> None:
    """Fork, compare, print what was found a line each; runs in a process of its own."""
    import numpy as np
    import torch

    if warmed:
        sys.path.insert(0, str(REPO))
        import litrecipe.model.first_use  # noqa: F401
    numbers = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 3, SIZE).astype(np.float32))
    for number in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, compared(numbers, number).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            print(told.read(), flush=True)
        os.waitpid(child, 0)


def compared(numbers: object, number: int) -> str:
    """`exp 0`: the first function of this child, and the largest relative difference of its two calls, over all."""
    import torch

    assert isinstance(numbers, torch.Tensor)
    torch.set_num_threads(2)
    first = number % len(FUNCTIONS)
    worst = 0.0
    for name in FUNCTIONS[first:] + FUNCTIONS[:first]:
        function = getattr(torch, name)
        once, again = function(numbers), function(numbers)
        worst = max(worst, float(((once - again).abs() / again.abs().clamp(min=1e-30)).max()))
    return f"{FUNCTIONS[first]} {worst:.3e}"


def found(count: int, warmed: bool) -> dict[str, object]:
    """Starts, those that differ by the function that came first, and by how much at most."""
    command = [sys.executable, __file__, "--starts", str(count), "--child", "warmed" if warmed else "plain"]
    lines = [line.split() for line in run_child(command).check().output.splitlines() if line.strip()]
    differ = [(name, float(worst)) for name, worst in lines if float(worst) > 0]
    return {
        "starts": len(lines),
        "differ": len(differ),
        "by_first_function": dict(Counter(name for name, _ in differ)),
        "largest_relative_difference": max((worst for _, worst in differ), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3000)
    parser.add_argument("--child", choices=["plain", "warmed"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        starts(arguments.starts, arguments.child == "warmed")
        return
    results = {name: found(arguments.starts, name == "warmed") for name in ("plain", "warmed")}
    print_table(["", *results["plain"]], [[name, *map(str, row.values())] for name, row in results.items()])
    write_result("first_use", {"numbers": SIZE, "threads": 2, "functions": FUNCTIONS, **results})
    if results["warmed"]["differ"]:
        sys.exit("first_use: a start differs although one thread came first")


if __name__ == "__main__":
    main()
