"""What a case of the peers' workload comes to without rounding: `simulation_float64.py CASE FILE`.

The plain loop in float64, one hospital after the other, in one process; the final weights [P] go to FILE (.npy). Beside
it stands how far rounding alone takes each contender, the plain loop in float32 included. `workload` is imported from
the peers' folder, which has to be on PYTHONPATH.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import workload


def final_weights(case: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Train the case in float64 and return the last weights [P]."""
    import torch

    torch.set_num_threads(1)
    network = workload.make_model(case).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=workload.LR)
    parameters = [parameter.data for parameter in network.parameters()]
    common = [parameter.clone() for parameter in parameters]
    for number in range(case["rounds"]):
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        total = 0
        for client in workload.cohort(case, number):
            images, masks = workload.client_data(case, client)
            torch._foreach_copy_(parameters, common)
            workload.local_train(network, optimizer, images.double(), masks, case["batch"])
            torch._foreach_add_(sums, parameters, alpha=float(len(images)))
            total += len(images)
        common = [one / total for one in sums]
    return torch.cat([one.reshape(-1) for one in common]).numpy()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in workload.CASES:
        sys.exit(f"usage: simulation_float64.py {'|'.join(workload.CASES)} FILE")
    np.save(Path(sys.argv[2]), final_weights(workload.case(sys.argv[1])))
