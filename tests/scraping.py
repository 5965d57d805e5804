"""Reading the metrics page of the tests' Ray cluster as Prometheus does."""

import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def metrics_address():
    """Return host:port of the node's metrics page."""
    import ray

    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def scrape(prefix="ray_medfl_"):
    """Return the samples whose name begins so; every scrape takes the gauges with it."""
    with urllib.request.urlopen(f"http://{metrics_address()}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        return [sample for family in families for sample in family.samples if sample.name.startswith(prefix)]


def scrape_until(is_enough, within_s=30.0):
    """Return what scrapes found together, the newest value of each series, as soon as that is enough."""
    found, ends = {}, time.monotonic() + within_s
    while time.monotonic() < ends:
        found |= {(sample.name, tuple(sorted(sample.labels.items()))): sample for sample in scrape()}
        if is_enough(list(found.values())):
            return list(found.values())
        time.sleep(0.3)
    raise AssertionError(f"not enough within {within_s} s: {sorted({sample.name for sample in found.values()})}")


def of_run(samples, run, name=None):
    """Return the samples of one run, of one name where it is given."""
    return [s for s in samples if s.labels.get("run") == run and (name is None or s.name == name)]
