"""Plans and searches with real compiles on eight devices of this CPU; prints what came out as JSON.

A process of its own: what it compiles for is set before JAX starts.
"""

import dataclasses
import json

import jax

from vpae_jax import config
from vpae_jax.configs import teacher
from vpae_jax.planning import compiling, report, search
from vpae_jax.planning.chips import CHIPS
from vpae_jax.planning.clips import size_of
from vpae_jax.planning.topology import Topology


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    values = teacher.get_config()
    values.model.remat = "none"
    experiment, clip = config.parse(values), size_of("tiny")
    roomy = Topology("v5e:2x4", dataclasses.replace(CHIPS["v5e"], reserved=0), (2, 4))
    asked = compiling.make_plan(experiment, clip, roomy, jax.devices(), lambda _: None)

    def within(memory: int) -> search.SearchResult:
        chip = dataclasses.replace(roomy.chip, memory=memory)
        tight, short = dataclasses.replace(roomy, chip=chip), dataclasses.replace(asked, chip=chip)
        return search.search(experiment, clip, tight, jax.devices(), short, lambda _: None, 3)

    found, none = within((asked.total or 0) - 1), within(1000)
    page = report.proposal(found)
    print(json.dumps({"asked": asked.as_json(), "found": found.as_json(), "none": none.as_json(), "page": page}))


if __name__ == "__main__":
    main()
