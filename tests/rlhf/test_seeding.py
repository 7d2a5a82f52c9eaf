import itertools
import os
import subprocess
import sys
from pathlib import Path

from rlhf.seeding import derive_seed

ROOT = Path(__file__).parents[2]


def test_seeds_never_change_between_releases():
    # Recorded: a change here would silently change every deterministic run.
    assert derive_seed(0) == 860726802
    assert derive_seed(7, "prompt-1", 2, 3) == 1550756821


def test_every_process_derives_the_same_seed():
    code = "from rlhf.seeding import derive_seed; print(derive_seed(7, 'prompt-1', 2, 3))"
    seeds = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert seeds == {str(derive_seed(7, "prompt-1", 2, 3))}


def test_siblings_prompts_epochs_and_runs_get_seeds_of_their_own():
    paths = list(itertools.product(range(5), ("a", "b", "c"), range(5), range(8)))
    assert len({derive_seed(*path) for path in paths}) == len(paths)


def test_the_parts_do_not_run_together():
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed(1) != derive_seed("1")


def test_seeds_fit_31_bits_and_use_them():
    seeds = [derive_seed(i) for i in range(2000)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert min(seeds) < 2**24
    assert max(seeds) > 2**31 - 2**24
