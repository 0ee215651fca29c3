"""Which reward brings a small network to the optimal policy of gold, in the 8x8 exact world?

`python benchmarks/mlp_policy.py`: a policy for each seed and reward, all trained at once by
REINFORCE (see `trueward.lab.mlp_policy`); prints a Markdown table with intervals over the seeds.
"""

import argparse
import time

import torch

from trueward.lab.exact import ExactWorld
from trueward.lab.mlp_policy import MLPPolicyConfig, compare_mlp_policies, mlp_policy_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=16, help="answers to a prompt in an update")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--beta", type=float, default=0.1, help="price of a nat of KL")
    args = parser.parse_args()
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    start = time.perf_counter()
    outcomes = compare_mlp_policies(
        ExactWorld(beta=args.beta),
        range(args.first_seed, args.first_seed + args.seeds),
        config=MLPPolicyConfig(
            updates=args.updates, samples=args.samples, learning_rate=args.learning_rate
        ),
    )
    print(mlp_policy_table(outcomes))
    print(f"\n{args.seeds} seeds, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
