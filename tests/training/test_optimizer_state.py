"""training/optimizer_state.py: a saved optimizer state is used only if every part of it fits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from training.optimizer_state import load_optimizer


class State:
    """A model of two layers with its optimizer, like those of the trainings."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, steps: int = 0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        ones = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": ones}, {"params": [p for p in self.model.parameters() if p.ndim > 1]}]
        self.optimizer = kind(groups, lr=1e-2, betas=(0.8, 0.9), fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=True)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.model(torch.ones(2, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def content(self) -> dict:
        return {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict() | {"scale": 8.0},
            "config": {},
        }


@pytest.fixture(scope="module")
def content() -> dict:
    return State(steps=2).content()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_good_state_goes_on_as_if_never_stopped(kind: type[torch.optim.Optimizer]) -> None:
    """Whatever the strides in the file: one element expanded, a transposed or half-precision tensor."""
    whole = State(kind, steps=1)
    content = whole.content()
    for entry in content["optimizer"]["state"].values():
        entry["exp_avg"] = entry["exp_avg"].mT.contiguous().mT if entry["exp_avg"].ndim > 1 else entry["exp_avg"]
        entry["step"] = int(entry["step"])
    resumed = State(kind)
    resumed.model.load_state_dict(whole.model.state_dict())
    load_optimizer(resumed, resumed.model, content, "a.pth")
    assert resumed.scaler.get_scale() == 8.0
    for state in (whole, resumed):
        state.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_settings_are_the_optimizers_own_and_no_memory_is_shared(content: dict) -> None:
    content = copy.deepcopy(content)
    for group in content["optimizer"]["param_groups"]:
        group |= {"betas": ("a",), "fused": False, "lr": "x", "amsgrad": True, "capturable": 3}
    content["optimizer"]["state"][2]["exp_avg"] = torch.full((1, 1), 0.5).expand(4, 3)
    state = State()
    load_optimizer(state, state.model, content, "a.pth")
    assert all(g["betas"] == (0.8, 0.9) and g["fused"] and g["lr"] == 1e-2 for g in state.optimizer.param_groups)
    state.step()  # writing to an expanded tensor would change all of it at each element
    assert len(set(state.optimizer.state_dict()["state"][2]["exp_avg"].flatten().tolist())) > 1


def test_missing_moments_are_named_and_start_from_zero_only_in_published_files(
    content: dict, messages: list[str]
) -> None:
    content = copy.deepcopy(content)
    del content["optimizer"]["state"][0]
    state = State()
    with pytest.raises(
        ValueError, match=r"a\.pth does not fit .*lacks the moments of 1 of 4 parameters, first: 0\.bias"
    ):
        load_optimizer(state, state.model, content, "a.pth")
    load_optimizer(state, state.model, {key: value for key, value in content.items() if key != "config"}, "a.pth")
    assert "lacks the moments of 1 of 4 parameters, first: 0.bias; they start from zero" in messages[-1]
    load_optimizer(state, state.model, content | {"optimizer": content["optimizer"] | {"state": {}}}, "a.pth")
    assert "of 4 of 4 parameters" in messages[-1]
    state.step()


def entry(**values: object) -> Callable[[dict], None]:
    """A change of the third parameter's entry (0.weight, 4 x 3); None removes a key."""

    def change(content: dict) -> None:
        found = content["optimizer"]["state"][2] | values
        content["optimizer"]["state"][2] = {key: value for key, value in found.items() if value is not None}

    return change


def groups(change: Callable[[list], object]) -> Callable[[dict], None]:
    return lambda content: content["optimizer"].update(param_groups=change(content["optimizer"]["param_groups"]))


def part(name: str, value: object) -> Callable[[dict], None]:
    return lambda content: content["optimizer"].update({name: value})


DAMAGE = {
    "no moments": (entry(exp_avg=None), "it lacks exp_avg of 0.weight"),
    "no second moments": (entry(exp_avg_sq=None), "it lacks exp_avg_sq of 0.weight"),
    "no step": (entry(step=None), "the step count of 0.weight is None"),
    "negative step": (entry(step=torch.tensor(-1.0)), "the step count of 0.weight is -1.0"),
    "steps": (entry(step=torch.zeros(3)), "the step count of 0.weight is tensor"),
    "other shape": (
        entry(exp_avg=torch.zeros(3, 4)),
        r"exp_avg of 0.weight has shape \(3, 4\), the parameter \(4, 3\)",
    ),
    "scalar": (entry(exp_avg_sq=torch.tensor(0.0)), r"exp_avg_sq of 0.weight has shape \(\)"),
    "number": (entry(exp_avg=0.5), "exp_avg of 0.weight has shape no tensor but float"),
    "integers": (entry(exp_avg=torch.zeros(4, 3, dtype=torch.int64)), "exp_avg of 0.weight is of type torch.int64"),
    "complex": (entry(exp_avg=torch.zeros(4, 3, dtype=torch.complex64)), "is of type torch.complex64"),
    "sparse": (entry(exp_avg=torch.zeros(4, 3).to_sparse()), "torch.sparse_coo, cpu.* not of dense floats"),
    "meta": (entry(exp_avg=torch.zeros(4, 3, device="meta")), "meta.* not of dense floats"),
    "NaN": (entry(exp_avg=torch.full((4, 3), float("nan"))), "exp_avg of 0.weight has values from nan to nan"),
    "infinite": (entry(exp_avg_sq=torch.full((4, 3), float("inf"))), "has values from inf to inf"),
    "too large": (entry(exp_avg=torch.full((4, 3), 1e300, dtype=torch.float64)), "has values from inf to inf"),
    "negative squares": (entry(exp_avg_sq=torch.full((4, 3), -1.0)), "exp_avg_sq of 0.weight has values from -1 to -1"),
    "no entry": (
        lambda content: content["optimizer"]["state"].update({2: 3}),
        "its entry of 0.weight is no tensor but",
    ),
    "unknown number": (lambda content: content["optimizer"]["state"].update({9: {}}), "no dict by the numbers"),
    "no state": (part("state", None), "no dict by the numbers"),
    "no groups": (part("param_groups", []), "it has no parameter groups"),
    "groups of text": (part("param_groups", ["a"]), "it has no parameter groups"),
    "one group": (groups(lambda g: g[:1]), r"its groups hold \[2\] parameters, here they hold \[2, 2\]"),
    "no numbers": (groups(lambda g: [x | {"params": None} for x in g]), "no list of different numbers"),
    "equal numbers": (groups(lambda g: [x | {"params": [0, 1]} for x in g]), "no list of different numbers"),
    "text as numbers": (groups(lambda g: [x | {"params": ["a", [1]]} for x in g]), "no list of different numbers"),
    "other names": (
        groups(lambda g: [g[0] | {"param_names": ["1.bias", "0.bias"]}, g[1]]),
        "it is of a parameter '1.bias' where this model has 0.bias",
    ),
    "scale": (lambda content: content["scaler"].update(scale=float("inf")), "scale of its gradient scaler is inf"),
    "tracker": (lambda content: content["scaler"].pop("_growth_tracker"), "_growth_tracker .* is None"),
    "scaler": (lambda content: content.update(scaler=[1]), "scale of its gradient scaler is None"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused(content: dict, damage: str) -> None:
    change, words = DAMAGE[damage]
    content, state = copy.deepcopy(content), State(steps=1)
    change(content)
    before = copy.deepcopy(state.optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"the optimizer state in a\.pth does not fit this model: .*{words}"):
        load_optimizer(state, state.model, content, "a.pth")
    if damage not in ("scale", "tracker", "scaler"):
        after = state.optimizer.state_dict()["state"]
        assert all(torch.equal(entry["exp_avg"], after[n]["exp_avg"]) for n, entry in before["state"].items())


def test_names_in_the_file_that_agree_are_no_obstacle(content: dict) -> None:
    content = copy.deepcopy(content)
    for group, names in zip(
        content["optimizer"]["param_groups"], (["0.bias", "1.bias"], ["0.weight", "1.weight"]), strict=True
    ):
        group["param_names"] = names
    state = State()
    load_optimizer(state, state.model, content, "a.pth")
    state.step()
