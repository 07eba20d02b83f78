"""Recipes that failed once, as simple as they can be; each with what was wrong."""

from __future__ import annotations

from tests.fuzz.recipes import Recipe

REGRESSIONS: dict[str, Recipe] = {
    "weights of a checkpoint in double precision were rounded on resume": Recipe(),
    "a recorded step went on with the old value of a deep dict": Recipe(states=("in_deep_dict",)),
    "a recorded step went on with the old value deep in a namespace": Recipe(states=("in_namespace",)),
    "a recorded step went on with the old value of an OmegaConf": Recipe(states=("in_omegaconf",)),
    "a recorded step went on with the old value of an object with slots": Recipe(states=("in_slots",)),
    "a recorded step went on with the old value behind a bound method": Recipe(states=("in_method",)),
    "a recorded step went on with the old value of a numpy array": Recipe(states=("in_array",)),
    "a recorded step went on with the old value of a deque": Recipe(states=("in_deque",)),
    "a recorded step went on with the old value of a class attribute": Recipe(states=("in_class",)),
    "a recorded step went on with the old value of a tensor that Python reads": Recipe(states=("in_tensor_read",)),
    "a tensor in an attribute was written once for all clients": Recipe(states=("add",)),
    "a tensor in a list was written once for all clients": Recipe(states=("add_in_list",)),
    "a counter deep in a namespace counted once for all clients": Recipe(states=("count_deep",)),
    "a counter in an object with slots counted once for all clients": Recipe(states=("count_in_slots",)),
    "a counter in a numpy array counted once for all clients": Recipe(states=("count_in_array",)),
    "a hook of a parameter was not called": Recipe(blocks=("parameter_hook",)),
    "an empty cohort froze the model": Recipe(
        seed=7, samples=41, epochs=6, strategy={"num_clients": "5", "clients_per_round": "2", "sampler": "'poisson'"}
    ),
}
