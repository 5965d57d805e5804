"""The demo, timed, beside local-only and central training; and the hippocampus beside central training.

Without the images (data/hippocampus, or the folder that MEDFL_HIPPOCAMPUS names; `medfl-ray data fetch
hippocampus` gets them) the two hippocampus figures are reported as not measured.
"""

from __future__ import annotations

from harness import Goal, Options, benchmark, report
from runs import hippocampus_folder, mean_of, run

GOALS = (
    Goal("demo_seconds", at_most=300),
    Goal("federated_minus_local_dice", at_least=0.0),
    Goal("hippocampus_federated_dice", at_least=0.80),
    Goal("hippocampus_central_minus_federated_dice", at_most=0.02),
)


def measure(options: Options) -> dict[str, float]:
    """Run the demo as it is, once more with the central baseline, and the hippocampus without DP."""
    short = ["federation.rounds=2", "federation.local_steps=2"] if options.quick else []
    demo = run("demo.yaml", options.out, short)
    pooled = run("demo.yaml", options.out, short, baseline="central")
    figures = {
        "demo_seconds": demo.seconds,
        "federated_dice": mean_of(demo.federated()),
        "local_dice": mean_of(demo.local()),
        "central_dice": mean_of(pooled.central()),
    }
    figures["federated_minus_local_dice"] = figures["federated_dice"] - figures["local_dice"]
    images = hippocampus_folder()
    if images is not None:
        quick = ["federation.rounds=1"] if options.quick else []
        brain = run("hippocampus.yaml", options.out, [f"data.directory={images}", *quick])
        figures["hippocampus_federated_dice"] = mean_of(brain.federated())
        figures["hippocampus_central_dice"] = mean_of(brain.central())
        figures["hippocampus_central_minus_federated_dice"] = (
            figures["hippocampus_central_dice"] - figures["hippocampus_federated_dice"]
        )
    return figures


if __name__ == "__main__":
    with benchmark(__doc__) as options:
        report(options, measure(options), GOALS)
