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
    "a round of nobody after a resume showed a metric of the epoch before the last": Recipe(
        seed=710070,
        logs=("accuracy",),
        strategy={"num_clients": "4", "clients_per_round": "0.5", "sampler": "'poisson'"},
    ),
    "a padding row was trained": Recipe(tokens="padding_idx"),
    "sparse gradients met a dense correction": Recipe(
        tokens="sparse_embedding", strategy={"num_clients": "3", "local_rule": "'scaffold'"}
    ),
    "sparse gradients of bags met a dense correction": Recipe(
        tokens="sparse_bag", strategy={"num_clients": "3", "local_rule": "local_rules.fed_prox(0.1)"}
    ),
    "dropout of a transformer layer differed": Recipe(blocks=("transformer",)),
    "a backward hook was not called": Recipe(blocks=("backward_hook",)),
    "a failed attempt left a teacher written": Recipe(blocks=("teacher",)),
    "a failed attempt left a frozen parameter written": Recipe(states=("frozen_written",)),
    "a failed attempt left the data of a frozen parameter written": Recipe(states=("frozen_data",)),
    "the last batch was not known": Recipe(states=("last_batch",)),
    "random numbers were replayed in another precision": Recipe(states=("torch_random",)),
    "a failed attempt drew from Python's generator": Recipe(states=("python_random",)),
    "a failed attempt drew from numpy's generator": Recipe(states=("numpy_random",)),
    "a failed attempt drew from a generator of the module": Recipe(states=("own_generator",)),
    "whole models of clients drew from the global generators": Recipe(
        optimizer="ASGD(lr=0.05)", strategy={"num_clients": "3", "personal": "local_rules.Ditto(0.1)"}
    ),
    "a recorded step went on with the old value of a global": Recipe(states=("in_module_of_python",)),
    "a recorded step went on with the old value in a global dict": Recipe(states=("in_global_dict",)),
    "a recorded step went on with the old value of a global object": Recipe(states=("in_global_object",)),
    "a dry run left a global tensor written": Recipe(states=("add_in_global",)),
    "a dry run left a global counter written": Recipe(states=("count_in_global",)),
    "a dry run left an iterator where it had come to": Recipe(states=("next",)),
    "all clients had the first one's dataclass": Recipe(batch="dataclass"),
    "all clients had the first one's UserDict": Recipe(batch="user_dict"),
    "all clients had the first one's encoding": Recipe(batch="encoding"),
    "all clients had the first one's Mapping": Recipe(batch="mapping"),
    "all clients had the first one's list of an own class": Recipe(batch="my_list"),
    "all clients had the first one's dict of an own class": Recipe(batch="my_dict"),
    "all clients had the first one's array": Recipe(batch="with_array"),
}
